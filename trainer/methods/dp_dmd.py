"""DP-DMD: the first step follows the teacher and keeps its diversity, the others are matched."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fewstep.errors import ConfigError
from fewstep.trainer.components.anchors import FirstStepAnchor
from fewstep.trainer.components.grids import NOT_FIRST_EXIT, Exit, even_path
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

FIRST_EXIT = Exit(0, 0)


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Where the teacher is met by the student's first step."""

    teacher_steps: int = 12
    """K: steps of the teacher's whole trajectory (paper: 30)."""
    steps: int = 3
    """k: how many of them the first step replaces (paper: 5 of 30, released script 10)."""
    weight: float = 0.05
    """Of the first step's loss."""

    def __post_init__(self) -> None:
        at_least("teacher-steps", self.teacher_steps, 1)
        within("steps", self.steps, 1, self.teacher_steps)
        above("weight", self.weight, 0.0)


@dataclass(frozen=True, kw_only=True)
class DpDmd(Method):
    """Wu et al. 2026: role-separated steps."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="dp-dmd",
        summary="the first step regresses the teacher's path, the later ones are matched",
        paper="DP-DMD, arXiv:2602.03139",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="|v_student(z) - (z - z_k) / (1 - sigma_k)|^2 on step 1; grad of dmd2 on steps "
        "2 to N, never through step 1",
        deviations="matches a random later step instead of unrolling all; critic is an adapter "
        "unless lora.critic is full; lower bound on the normaliser as in CDM",
    )
    match: MatchConfig = field(default_factory=lambda: MatchConfig(exit="not-first"))
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, anchor = self.match, self.anchor
        rollout = StudentRollout(frame.grid, NOT_FIRST_EXIT)
        matching = ScoreDifference(
            rollout, guided_teacher(frame), tau=match.tau, normaliser=match.normaliser
        )
        first = FirstStepAnchor(
            StudentRollout(frame.grid, FIRST_EXIT),
            even_path(frame.schedule, anchor.teacher_steps, shift=frame.config.grid.shift),
            anchor.steps,
            frame.guidance_scale,
        )
        return (
            Stage(
                name="anchored matching",
                num_steps=match.num_steps,
                terms=(Weighted(matching), Weighted(first, anchor.weight)),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(rollout),
            ),
        )

    def check(self, config: "TrainConfig") -> None:
        if config.grid.all_steps[0] < 2:
            raise ConfigError(
                "dp-dmd anchors the first step and matches the others, so grids need 2 steps or "
                "more, got one of 1 step; raise grid.num-steps or leave 1 out of grid.also-steps"
            )
        if self.match.exit != "not-first":
            raise ConfigError(
                f"dp-dmd never matches the first step, but match.exit is {self.match.exit!r}; "
                "leave it at not-first"
            )
