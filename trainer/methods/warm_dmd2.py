"""The recommended start: a trajectory warm start, then distribution matching."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fewstep.errors import ConfigError
from fewstep.trainer.methods.dmd2 import dmd2_stage
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.sfd import TrajectoryConfig, trajectory_stage
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class WarmDmd2(Method):
    """SFD, then DMD2 from its average."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="warm-dmd2",
        summary="trajectory warm start (sfd), then distribution matching (dmd2)",
        paper="SFD 2409.19681, then DMD2 2405.14867",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="those of sfd, then of dmd2",
    )
    warm_start: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    warm_share: float = 0.2
    """Part of a budget that the warm start gets."""

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        warm = trajectory_stage(frame, self.warm_start, share=self.warm_share)
        match = dmd2_stage(frame, self.match, share=1.0 - self.warm_share)
        return tuple(stage for stage in (warm, match) if stage.num_steps)

    def check(self, config: "TrainConfig") -> None:
        if self.warm_start.num_steps == self.match.num_steps == 0:
            raise ConfigError(
                "both stages have 0 steps; set method.warm-start.num-steps or "
                "method.match.num-steps"
            )
