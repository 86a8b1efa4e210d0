"""LCM: latent consistency distillation of a guided teacher, for students that re-noise."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fewstep.trainer.components.distances import PseudoHuber
from fewstep.trainer.components.jump import JumpTerm
from fewstep.trainer.components.jump_times import SegmentTimes
from fewstep.trainer.components.moves import Jumped, Ode
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.jumps import TARGETS, JumpConfig
from fewstep.trainer.methods.ladders import ladder_of
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Lcm(Method):
    """Luo et al. 2023: neighbours on the teacher's trajectory have one clean end."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="lcm",
        summary="consistency distillation: every point of a teacher trajectory maps to its end",
        paper="LCM, arXiv:2310.04378; LCM-LoRA, arXiv:2311.05556",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="huber(x0(x_t), stopgrad x0(teacher step x_t -> x_u)), u = t - 1/50",
        deviations="no guidance embedding, as in LCM-LoRA; the boundary holds by the last step to "
        "clean data, not by c_skip; the grid is made to hold the student's levels",
    )
    jump: JumpConfig = field(default_factory=JumpConfig)
    teacher_steps: int = 50
    """Steps of the teacher's grid (at least; a multiple of the student's)."""
    target: Literal["student", "average"] = "average"
    """Whose answer at the neighbour is the target: the student as it is, or its average (EMA)."""
    huber_c: float = 0.001
    """Errors below it count squared, above it by their size."""

    def __post_init__(self) -> None:
        at_least("teacher-steps", self.teacher_steps, 1)
        above("huber-c", self.huber_c, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        term = JumpTerm(
            self.jump.start(frame),
            SegmentTimes(ladder_of(frame, self.teacher_steps)),
            Ode(self.jump.scale(frame)),
            Jumped(TARGETS[self.target]),
            PseudoHuber(self.huber_c),
            name="consistency",
        )
        stage = Stage(
            name="consistency",
            num_steps=self.jump.num_steps,
            terms=(Weighted(term),),
            learning_rate=self.jump.learning_rate,
            uses_data=self.jump.uses_data,
        )
        return (stage,)

    def grid(self, grid: GridConfig) -> GridConfig:
        return dataclasses.replace(grid, stochasticity=1.0)
