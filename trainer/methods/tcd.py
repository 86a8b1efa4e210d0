"""TCD and Hyper-SD's TSCD: consistency along segments that grow from stage to stage."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.trainer.components.distances import L2, Distance, PseudoHuber
from fewstep.trainer.components.jump import JumpTerm
from fewstep.trainer.components.jump_times import SegmentTimes
from fewstep.trainer.components.moves import Jumped, Ode
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least, within
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.jumps import TARGETS, JumpConfig
from fewstep.trainer.methods.ladders import ladder_of
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Tcd(Method):
    """Zheng et al. 2024, with the segments of Ren et al. 2024."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="tcd",
        summary="trajectory consistency on 8, 4, 2, then 1 segments; any step count, gamma sampler",
        paper="TCD, arXiv:2402.19159; Hyper-SD (TSCD), arXiv:2404.13686",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="|X(x_t; t -> s) - stopgrad X(teacher x_t -> x_u; u -> s)|^2, s in the segment",
        deviations="no adversarial share, no human feedback and no score distillation stage of "
        "Hyper-SD; s is not an input of the network",
    )
    jump: JumpConfig = field(default_factory=lambda: JumpConfig(num_steps=200))
    segments: tuple[int, ...] = (8, 4, 2, 1)
    """Segments of each stage."""
    end: Literal["segment", "random"] = "random"
    """Where jumps end: where their segment does, or anywhere before it (TCD)."""
    teacher_steps: int = 40
    """Steps of the teacher's grid (at least; a multiple of the student's and of the segments)."""
    target: Literal["student", "average"] = "average"
    """Whose jump makes the target."""
    distance: Literal["l2", "huber"] = "huber"
    """Of the two ends."""
    gamma: float = 0.3
    """Stochasticity of the sampler in the named recipe (TCD's eta)."""

    def __post_init__(self) -> None:
        if not self.segments:
            raise ConfigError("segments is empty; name the segments of each stage, such as 8 4 2 1")
        for count in self.segments:
            at_least("segments", count, 1)
        at_least("teacher-steps", self.teacher_steps, 1)
        within("gamma", self.gamma, 0.0, 1.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return tuple(self._stage(frame, count) for count in self.segments)

    def _stage(self, frame: Frame, segments: int) -> Stage:
        ladder = ladder_of(frame, self.teacher_steps, multiple=segments)
        distance: Distance = L2() if self.distance == "l2" else PseudoHuber()
        term = JumpTerm(
            self.jump.start(frame),
            SegmentTimes(ladder, segments, self.end == "random"),
            Ode(self.jump.scale(frame)),
            Jumped(TARGETS[self.target]),
            distance,
            name="trajectory_consistency",
        )
        return Stage(
            name=f"{segments} segments",
            num_steps=self.jump.num_steps,
            terms=(Weighted(term),),
            learning_rate=self.jump.learning_rate,
            uses_data=self.jump.uses_data,
        )

    def grid(self, grid: GridConfig) -> GridConfig:
        return dataclasses.replace(grid, stochasticity=self.gamma)
