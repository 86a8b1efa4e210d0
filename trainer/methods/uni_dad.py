"""Uni-DAD: a student that is distilled and moved to a new domain of a few pictures in one run."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.rollouts import RealLatents
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import ConstantGuidance, Guided, Mixture
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.data.digit_domain import Domain, digits_of_domain
from fewstep.trainer.data.latent_book import LatentBook, latents_of_digits
from fewstep.trainer.methods.adversarial import HEADS, GanConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Stage

TARGET_TEACHER = Role("target-teacher")


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """The target teacher: an adapter on the source teacher, fine-tuned by plain denoising."""

    digits: Domain = "thick"
    """Digits teachers without data.images: which built-in domain its pictures are of."""
    num_pictures: int = 30
    """How many of them."""
    num_steps: int = 300
    """Optimizer steps of the fine-tuning."""
    learning_rate: float = 5e-4
    """Constant."""
    null_share: float = 0.1
    """Share of pictures shown without their prompt, as the target teacher is guided too."""
    share: float = 0.1
    """Part of a budget."""

    def __post_init__(self) -> None:
        within("domain.num-pictures", self.num_pictures, 1, 1000)
        at_least("domain.num-steps", self.num_steps, 1)
        above("domain.learning-rate", self.learning_rate, 0.0)
        within("domain.null-share", self.null_share, 0.0, 1.0)
        within("domain.share", self.share, 0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class UniDad(Method):
    """Bahram et al. 2025: dual-domain distribution matching with a discriminator of the target."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="uni-dad",
        summary="distils a source teacher and its fine-tune on a few pictures at the same time",
        paper="Uni-DAD, arXiv:2511.18281",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="grad = critic - (lambda T_source + (1 - lambda) T_target), over mean|x0 - T|; "
        "+ w softplus(-D(x_tau)) against the new domain's pictures",
        deviations="the target teacher is fine-tuned first, not online; two heads on the critic's "
        "features instead of one per scale",
    )
    domain: DomainConfig = field(default_factory=DomainConfig)
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(learning_rate=3e-4, critic_learning_rate=1e-3)
    )
    gan: GanConfig = field(default_factory=GanConfig)
    source_share: float = 0.25
    """lambda: the source teacher's part of the target; 1 stays in the source domain."""

    def __post_init__(self) -> None:
        within("source-share", self.source_share, 0.0, 1.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return self._adaptation(frame), self._matching(frame)

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        return self.gan.modules(frame) if self.gan.weight else {}

    def latents(self, frame: Frame) -> LatentBook:
        pictures = digits_of_domain(self.domain.digits, self.domain.num_pictures)
        return latents_of_digits(frame.backbone, pictures, frame.book)

    def _adaptation(self, frame: Frame) -> Stage:
        """Nobody but the target teacher learns: a critic of real pictures is a teacher of them."""
        domain = self.domain
        learner = Critic(
            RealLatents(frame.grid),
            learning_rate=domain.learning_rate,
            updates=1,
            warmup=0,
            tau=TauLaw(low=0.001, high=1.0),
            role=TARGET_TEACHER,
            null_share=domain.null_share,
        )
        return Stage(
            name="target teacher",
            num_steps=domain.num_steps,
            share=domain.share,
            critic=learner,
            uses_data=True,
        )

    def _matching(self, frame: Frame) -> Stage:
        match, gan = self.match, self.gan
        rollout = match.rollout(frame)
        law = ConstantGuidance(frame.guidance_scale)
        both = (Guided(law), Guided(law, TARGET_TEACHER))
        target = Mixture(both, (self.source_share, 1.0 - self.source_share))
        term = ScoreDifference(rollout, target, tau=match.tau, normaliser=match.normaliser)
        stage = Stage(
            name="dual-domain matching",
            num_steps=match.num_steps,
            share=1.0 - self.domain.share,
            terms=(Weighted(term),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=match.critic(rollout),
        )
        if not gan.weight:
            return stage
        judge = gan.judge(frame, rollout)
        return dataclasses.replace(
            stage,
            terms=(*stage.terms, gan.term(judge)),
            critic=match.critic(rollout, extras=(gan.extra(judge),), modules=(HEADS,)),
            uses_data=True,
        )
