"""Settings of a discriminator that methods share, and the pieces they become."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fewstep.trainer.components.discriminators import (
    Discriminator,
    DiscriminatorLoss,
    GanLoss,
    GanTerm,
    Heads,
    Hinge,
    Softplus,
    pooled,
)
from fewstep.trainer.components.features import NetworkFeatures, default_layers, shapes_of
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role

HEADS = "discriminator"
ROLES = {"critic": Role.CRITIC, "teacher": Role.TEACHER}
LAWS: dict[str, GanLoss] = {"softplus": Softplus(), "hinge": Hinge()}


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """A discriminator on features of the critic or the teacher."""

    weight: float = 5e-3
    """Of the student's adversarial loss, against distribution matching; 0 leaves it out."""
    discriminator_weight: float = 1e-2
    """Of the discriminator's loss, against the critic's."""
    loss: Literal["softplus", "hinge"] = "softplus"
    """softplus (DMD2; its logit is a density ratio) or hinge."""
    features: Literal["critic", "teacher"] = "critic"
    """Whose features: the critic's, which then learn to discriminate (DMD2), or the frozen
    teacher's."""
    layers: tuple[str, ...] = ()
    """Module paths whose outputs are read; empty takes the middle and the last of the family's."""
    width: int = 64
    """Hidden channels of the heads."""
    uses_prompt: bool = False
    """Whether the heads see the pooled prompt too (the features have seen it already)."""
    r1: float = 0.0
    """Weight of the approximate R1 penalty, |D(real) - D(real + noise)|^2; one more evaluation."""
    r1_noise: float = 0.1
    """Deviation of that noise."""
    tau_min: float = 0.0
    """Lowest noise at which is judged, share of the schedule."""
    tau_max: float = 1.0
    """Highest."""
    delay: float = 0.0
    """Share of the stage before the student sees the discriminator."""
    ramp: float = 0.0
    """Share of the stage over which its weight then rises."""

    def __post_init__(self) -> None:
        at_least("gan.weight", self.weight, 0.0)
        above("gan.discriminator-weight", self.discriminator_weight, 0.0)
        at_least("gan.width", self.width, 1)
        at_least("gan.r1", self.r1, 0.0)
        above("gan.r1-noise", self.r1_noise, 0.0)
        within("gan.tau-min", self.tau_min, 0.0, self.tau_max)
        within("gan.tau-max", self.tau_max, self.tau_min, 1.0)
        within("gan.delay", self.delay, 0.0, 1.0)
        within("gan.ramp", self.ramp, 0.0, 1.0)

    @property
    def tau(self) -> TauLaw:
        """Where is judged."""
        return TauLaw(low=self.tau_min, high=self.tau_max)

    def source(self, frame: Frame) -> NetworkFeatures:
        """What the heads see."""
        return NetworkFeatures(self.layers or default_layers(frame.backbone), ROLES[self.features])

    def judge(
        self, frame: Frame, rollout: Rollout, *, tau: TauLaw | None = None, name: str = "gan"
    ) -> Discriminator:
        """The discriminator of a rollout.

        Args:
            frame: What the method is built on.
            rollout: Whose results are fake.
            tau: Where is judged; None takes the settings'.
            name: Of its probe.
        """
        return Discriminator(
            self.source(frame),
            rollout,
            tau=self.tau if tau is None else tau,
            loss_law=LAWS[self.loss],
            module=HEADS,
            name=name,
        )

    def term(self, judge: Discriminator) -> Weighted:
        """The student's side."""
        return Weighted(GanTerm(judge), self.weight, delay=self.delay, ramp=self.ramp)

    def extra(self, judge: Discriminator) -> DiscriminatorLoss:
        """The discriminator's side, for the critic's update."""
        return DiscriminatorLoss(judge, self.discriminator_weight, self.r1, self.r1_noise)

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        """The heads."""
        null = frame.book.null_condition
        shapes = shapes_of(self.source(frame), frame.backbone, null)
        condition_width = pooled(null).shape[-1] if self.uses_prompt else 0
        return {HEADS: Heads(shapes, width=self.width, condition_width=condition_width)}
