"""Progressive distillation: two steps become one, round after round."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.grids import even_path
from fewstep.trainer.components.jump import JumpTerm, VelocitySpace
from fewstep.trainer.components.jump_times import MergedSteps
from fewstep.trainer.components.moves import FixedScale, Ode
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least
from fewstep.trainer.methods.jumps import JumpConfig
from fewstep.trainer.methods.ladders import ladder_of
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.players import student_policy
from fewstep.trainer.parameters.policies import ParameterPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Copy, Stage

ROUND = Role("round")
"""The teacher of a round: the student as the round before left it."""


@dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    """Salimans and Ho 2022."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="progressive",
        summary="progressive distillation: each round halves the steps, the student turns teacher",
        paper="progressive distillation, arXiv:2202.00512",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="|u(x_t; t -> s) - that of two teacher steps t -> s|^2, N -> N / 2",
        deviations="a round's teacher is the student's average; its weight is that of the average "
        "velocity, close to SNR + 1; the first round distils guidance too",
    )
    jump: JumpConfig = field(default_factory=lambda: JumpConfig(num_steps=200))
    rounds: int = 3
    """Halvings; the first teacher has 2^rounds times the student's steps."""

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        ladder_of(frame, 1)  # refuses a listed grid
        return tuple(self._stage(frame, index) for index in range(self.rounds))

    def _stage(self, frame: Frame, index: int) -> Stage:
        steps = frame.path.num_steps * 2 ** (self.rounds - 1 - index)
        is_first = index == 0
        teacher = Ode(self.jump.scale(frame)) if is_first else Ode(FixedScale(), ROUND)
        ladder = even_path(frame.schedule, 2 * steps, shift=frame.config.grid.shift)
        term = JumpTerm(
            self.jump.start(frame),
            MergedSteps(ladder),
            teacher,
            space=VelocitySpace(),
            name="round",
        )
        return Stage(
            name=f"{2 * steps} to {steps} steps",
            num_steps=self.jump.num_steps,
            terms=(Weighted(term),),
            learning_rate=self.jump.learning_rate,
            actions=() if is_first else (Copy(ROUND, Role.AVERAGE),),
            uses_data=self.jump.uses_data,
        )

    def roles(self, frame: Frame) -> tuple[tuple[Role, ParameterPolicy], ...]:
        return ((ROUND, student_policy(frame)),)
