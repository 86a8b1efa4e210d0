"""DMD2 with its discriminator: distribution matching, and real pictures as a second opinion."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fewstep.trainer.components.discriminators import Discriminator
from fewstep.trainer.components.signals import GradientWeight, ScoreDifference
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.methods.adversarial import HEADS, GanConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Dmd2Gan(Method):
    """Yin et al. 2024, complete: TTUR, backward simulation and a GAN on the critic's features."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="dmd2-gan",
        summary="dmd2 and a discriminator on the critic's features, with real pictures",
        paper="DMD2, arXiv:2405.14867",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="grad of dmd2 + w softplus(-D(x_tau)); "
        "D: softplus(D(fake_tau)) + softplus(-D(real_tau))",
        deviations="the critic is an adapter unless lora.critic is full; two layers are read, not "
        "the bottleneck alone; real pictures have the fake ones' prompts",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    gan: GanConfig = field(default_factory=GanConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        judge = self.gan.judge(frame, self.match.rollout(frame))
        return (adversarial_stage(frame, self.match, self.gan, judge),)

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        return self.gan.modules(frame)


def adversarial_stage(
    frame: Frame,
    match: MatchConfig,
    gan: GanConfig,
    judge: Discriminator,
    *,
    name: str = "adversarial matching",
    weights: tuple[GradientWeight, ...] = (),
) -> Stage:
    """Distribution matching with a discriminator.

    Args:
        frame: What the method is built on.
        match: Distribution matching.
        gan: The discriminator's settings.
        judge: The discriminator, of `match.rollout`.
        name: Of the stage.
        weights: Of single samples in the score difference.
    """
    rollout = match.rollout(frame)
    matching = ScoreDifference(
        rollout,
        guided_teacher(frame),
        tau=match.tau,
        normaliser=match.normaliser,
        weights=weights,
    )
    return Stage(
        name=name,
        num_steps=match.num_steps,
        terms=(Weighted(matching), gan.term(judge)),
        learning_rate=match.learning_rate,
        betas=match.betas,
        critic=match.critic(rollout, extras=(gan.extra(judge),), modules=(HEADS,)),
        uses_data=True,
    )
