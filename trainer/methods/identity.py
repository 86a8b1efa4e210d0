"""Settings that score-identity methods share, and the pieces they become."""

from dataclasses import dataclass
from typing import Literal

from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.signals import MeanAbs
from fewstep.trainer.components.targets import ConstantGuidance, GuidanceLaw
from fewstep.trainer.components.taus import Karras, TauLaw
from fewstep.trainer.config_checks import above, at_least, within

Guidance = Literal["teacher", "lsg", "zero-cfg", "anti-cfg"]


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Score identities: rates, critic, and where teacher and critic are asked."""

    num_steps: int = 400
    """Optimizer steps of the student."""
    learning_rate: float = 3e-4
    """Student."""
    critic_learning_rate: float = 1e-3
    """Critic."""
    critic_updates: int = 1
    """Critic steps per student step."""
    critic_warmup: int = 50
    """Critic steps before the first student step."""
    noise_min: float = 0.02
    """Lowest sigma / alpha at which teacher and critic are asked (EDM's scale, unit data)."""
    noise_max: float = 24.0
    """Highest; 24 is t = 800 of 1000 on EDM's grid up to 80."""
    normaliser_floor: float = 0.05
    """Lower bound of mean|x0 - teacher_x0|, the loss's denominator."""
    beta1: float = 0.0
    """AdamW's first beta."""

    def __post_init__(self) -> None:
        at_least("num-steps", self.num_steps, 1)
        above("learning-rate", self.learning_rate, 0.0)
        above("critic-learning-rate", self.critic_learning_rate, 0.0)
        at_least("critic-updates", self.critic_updates, 1)
        at_least("critic-warmup", self.critic_warmup, 0)
        above("noise-min", self.noise_min, 0.0)
        above("noise-max", self.noise_max, self.noise_min)
        within("normaliser-floor", self.normaliser_floor, 0.0, 10.0)
        within("beta1", self.beta1, 0.0, 0.999)

    @property
    def tau(self) -> TauLaw:
        """Evenly spaced in (sigma / alpha)^(1 / 7), as SiD draws it."""
        return TauLaw(density=Karras(low=self.noise_min, high=self.noise_max), low=0.0, high=1.0)

    @property
    def normaliser(self) -> MeanAbs:
        """Of the loss."""
        return MeanAbs(self.normaliser_floor)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return (self.beta1, 0.999)

    def critic(self, rollout: Rollout, laws: "Laws") -> Critic:
        """A critic that learns from that rollout at the same noise levels."""
        return Critic(
            rollout=rollout,
            learning_rate=self.critic_learning_rate,
            updates=self.critic_updates,
            warmup=self.critic_warmup,
            tau=self.tau,
            law=laws.training,
            null_share=laws.null_share,
        )


@dataclass(frozen=True, slots=True)
class Laws:
    """Where guidance enters.

    Attributes:
        teacher: Scale of the teacher (kappa 4).
        critic: Scale of the critic where it is compared with the teacher (kappa 2 and 3).
        training: Scale under which the critic is trained (kappa 1).
        null_share: Part of the critic's samples trained without their prompt.
    """

    teacher: GuidanceLaw
    critic: GuidanceLaw = ConstantGuidance()
    training: GuidanceLaw = ConstantGuidance()
    null_share: float = 0.0


def laws_of(guidance: Guidance, scale: float, anti_scale: float) -> Laws:
    """The paper's guidance strategies.

        teacher    the teacher alone is guided
        lsg        long and short: teacher and critic, the critic also where it is trained
        zero-cfg   the teacher is not, and the critic never sees a prompt
        anti-cfg   the teacher is not, and the critic is guided away from its prompt

    Args:
        guidance: Which.
        scale: The run's w.
        anti_scale: The critic's scale in anti-cfg, below 0.

    Source:
        SiD-LSG, arXiv:2406.01561 (mingyuanzhou/SiD-LSG: kappa 1 to 4); zero-cfg and anti-cfg,
        arXiv:2505.12674. How anti-cfg trains its critic is our reading: with and without prompts.
    """
    guided = ConstantGuidance(scale)
    if guidance == "lsg":
        return Laws(guided, guided, guided)
    if guidance == "zero-cfg":
        without = ConstantGuidance(0.0)
        return Laws(ConstantGuidance(), without, without)
    if guidance == "anti-cfg":
        return Laws(ConstantGuidance(), ConstantGuidance(anti_scale), null_share=0.1)
    return Laws(guided)
