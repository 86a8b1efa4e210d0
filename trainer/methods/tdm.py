"""TDM: every step of a deterministic student is matched inside its own interval of noise."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.trainer.components.critics import CriticWeight, ImportanceWeight, TransitionWeight
from fewstep.trainer.components.kernels import Interval, Kernel, OwnPrediction
from fewstep.trainer.components.signals import HuberPull, ScoreDifference
from fewstep.trainer.components.taus import AboveEnd, InsideStep, TauLaw, Uniform
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Tdm(Method):
    """Luo et al. 2025: trajectory distribution matching."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="tdm",
        summary="each deterministic step is matched between its own two levels of noise",
        paper="TDM, arXiv:2503.06674",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="huber(critic - teacher_w) / mean|x0 - teacher_w| at x_tau = a x_s + b e, tau in "
        "(s, t); critic weight min(SNR, 5) exp(-|e_mix|^2 / 2) / exp(-|e|^2 / 2)",
        deviations="the student is not told the step count; student and critic updates draw their "
        "own rollouts; critic is an adapter unless lora.critic is full",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    huber_c: float = 1e-3
    """Of the student's pseudo-Huber distance: differences above it count by their size only."""
    critic_target: Literal["student", "exact"] = "student"
    """What the critic learns: the student's own clean prediction, importance-weighted (TDM), or
    what the transition's score says exactly (Phased DMD)."""
    span: Literal["step", "above"] = "step"
    """Where teacher and critic are asked: inside the step, or anywhere noisier than its end."""
    margin: float = 0.02
    """How far inside, share of the schedule."""

    def __post_init__(self) -> None:
        above("huber-c", self.huber_c, 0.0)
        within("margin", self.margin, 0.001, 0.2)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match = self.match
        rollout = match.rollout(frame)
        span = InsideStep(self.margin) if self.span == "step" else AboveEnd(self.margin)
        tau = TauLaw(span, Uniform(match.tau_shift), low=match.tau_min, high=match.tau_max)
        kernel, weight = self._critic_laws()
        term = ScoreDifference(
            rollout,
            guided_teacher(frame),
            kernel=kernel,
            tau=tau,
            normaliser=match.normaliser,
            pull=HuberPull(self.huber_c),
        )
        critic = dataclasses.replace(match.critic(rollout, kernel=kernel), tau=tau, weight=weight)
        return (
            Stage(
                name="trajectory distribution matching",
                num_steps=match.num_steps,
                terms=(Weighted(term),),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=critic,
            ),
        )

    def check(self, config: "TrainConfig") -> None:
        if config.grid.stochasticity != 0.0:
            raise ConfigError(
                f"tdm matches deterministic steps, but grid.stochasticity is "
                f"{config.grid.stochasticity:g}; set it to 0"
            )

    def _critic_laws(self) -> tuple[Kernel, CriticWeight]:
        """How samples are noised and told to the critic, and what its error weighs."""
        interval = Interval(self.margin)
        if self.critic_target == "exact":
            return interval, TransitionWeight()
        return OwnPrediction(interval), ImportanceWeight()
