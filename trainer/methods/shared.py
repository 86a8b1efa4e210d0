"""Settings that methods share, and the pieces they become."""

from dataclasses import dataclass
from typing import Literal

from fewstep.trainer.components.critics import Critic, CriticExtra
from fewstep.trainer.components.grids import ANY_EXIT, LAST_EXIT, NOT_FIRST_EXIT
from fewstep.trainer.components.kernels import Kernel, Renoise
from fewstep.trainer.components.rollouts import Rollout, StudentRollout
from fewstep.trainer.components.signals import MeanAbs
from fewstep.trainer.components.targets import ConstantGuidance, Guided
from fewstep.trainer.components.taus import TauLaw, Uniform
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Action, Copy

EXITS = {"random": ANY_EXIT, "last": LAST_EXIT, "not-first": NOT_FIRST_EXIT}


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Distribution matching: rates, critic, and where teacher and critic are asked."""

    num_steps: int = 400
    """Optimizer steps of the student."""
    learning_rate: float = 3e-4
    """Student."""
    critic_learning_rate: float = 8e-4
    """Critic."""
    critic_updates: int = 2
    """Critic steps per student step (TTUR)."""
    critic_warmup: int = 50
    """Critic steps before the first student step."""
    exit: Literal["random", "last", "not-first"] = "random"
    """Step of the rollout that is compared: any (DMD2), the last (the picture itself), or any but
    the first."""
    tau_min: float = 0.02
    """Lowest noise at which teacher and critic are compared, share of the schedule."""
    tau_max: float = 0.98
    """Highest."""
    tau_shift: float = 1.0
    """Above 1 moves the comparisons toward noise, by the flow time shift formula."""
    normaliser_floor: float = 0.05
    """Lower bound of mean|x0 - teacher_x0|, the DMD gradient's denominator."""
    ida: float = 1.0
    """SenseFlow's IDA: critic = ida * critic + (1 - ida) * student after each step; 1 is off."""
    beta1: float = 0.0
    """AdamW's first beta (DMD family: 0)."""

    def __post_init__(self) -> None:
        at_least("num-steps", self.num_steps, 0)
        above("learning-rate", self.learning_rate, 0.0)
        above("critic-learning-rate", self.critic_learning_rate, 0.0)
        at_least("critic-updates", self.critic_updates, 1)
        at_least("critic-warmup", self.critic_warmup, 0)
        within("tau-min", self.tau_min, 0.0, self.tau_max)
        within("tau-max", self.tau_max, self.tau_min, 1.0)
        above("tau-shift", self.tau_shift, 0.0)
        within("normaliser-floor", self.normaliser_floor, 0.0, 10.0)
        within("ida", self.ida, 0.0, 1.0)
        within("beta1", self.beta1, 0.0, 0.999)

    @property
    def tau(self) -> TauLaw:
        """Where teacher and critic are compared."""
        return TauLaw(density=Uniform(self.tau_shift), low=self.tau_min, high=self.tau_max)

    @property
    def normaliser(self) -> MeanAbs:
        """Of the score difference."""
        return MeanAbs(self.normaliser_floor)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return (self.beta1, 0.999)

    def rollout(self, frame: Frame) -> StudentRollout:
        """Backward simulation on the run's grids."""
        return StudentRollout(frame.grid, EXITS[self.exit])

    def critic(
        self,
        rollout: Rollout,
        *,
        kernel: Kernel = Renoise(),  # noqa: B008 frozen
        extras: tuple[CriticExtra, ...] = (),
        modules: tuple[str, ...] = (),
        null_share: float = 0.0,
    ) -> Critic:
        """A critic that learns from that rollout at the comparison's noise levels."""
        return Critic(
            rollout=rollout,
            learning_rate=self.critic_learning_rate,
            updates=self.critic_updates,
            warmup=self.critic_warmup,
            kernel=kernel,
            tau=self.tau,
            keep=self.ida,
            extras=extras,
            modules=modules,
            null_share=null_share,
        )


def aligned(match: MatchConfig) -> tuple[Action, ...]:
    """Where IDA mixes adapters, the critic begins with the student's factors, still without effect.

    For first stages: mixing factors of different beginnings would mix neither network.
    """
    return (Copy(Role.CRITIC, Role.STUDENT),) if match.ida < 1.0 else ()


def guided_teacher(frame: Frame) -> Guided:
    """The teacher under the run's guidance scale."""
    return Guided(ConstantGuidance(frame.guidance_scale))
