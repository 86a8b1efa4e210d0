"""SwD: few steps that also grow from step to step, matched at every size."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from fewstep.trainer.components.embedding_mmd import (
    PatchDistance,
    PatchMmd,
    TokenMeans,
    TokenSets,
)
from fewstep.trainer.components.features import NetworkFeatures, default_layers
from fewstep.trainer.components.rollouts import DataRollout, Either, Rollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import ConstantGuidance, Guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least, within
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.adversarial import HEADS, GanConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import EXITS, MatchConfig, guided_teacher
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Stage

NULL_SHARE = 0.1
"""Of the critic's samples, where it is guided and so must know the null prompt."""
DISTANCES: dict[str, PatchDistance] = {"means": TokenMeans(), "rbf": TokenSets()}


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Tokens of a block of the teacher must be distributed as real ones."""

    weight: float = 10.0
    """Of the patch loss, against distribution matching; 0 leaves it out."""
    distance: Literal["means", "rbf"] = "means"
    """means: each picture's mean token (pseudo-Huber), as released; rbf: MMD of its tokens."""
    layers: tuple[str, ...] = ()
    """Module paths whose outputs are tokens; empty takes the middle one of the family's."""
    tau_min: float = 0.1
    """Lowest noise at which is compared, share of the schedule."""
    tau_max: float = 0.8
    """Highest."""

    def __post_init__(self) -> None:
        at_least("patches.weight", self.weight, 0.0)
        within("patches.tau-min", self.tau_min, 0.0, self.tau_max)
        within("patches.tau-max", self.tau_max, self.tau_min, 1.0)

    def terms(self, frame: Frame, rollout: Rollout) -> tuple[Weighted, ...]:
        """The loss, if there is any."""
        if not self.weight:
            return ()
        layers = self.layers or default_layers(frame.backbone)[:1]
        source = NetworkFeatures(layers, Role.TEACHER)
        tau = TauLaw(low=self.tau_min, high=self.tau_max)
        return (
            Weighted(PatchMmd(source, rollout, DISTANCES[self.distance], tau=tau), self.weight),
        )


@dataclass(frozen=True, kw_only=True)
class Swd(Method):
    """Starodubcev et al. 2025: scale-wise distillation."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="swd",
        summary="samples grow from step to step; dmd2-gan and patch matching at every size",
        paper="SwD, arXiv:2503.16397",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="grad of dmd2 + w softplus(-D(x_tau)) + v huber(mean tokens - real mean tokens), "
        "x0 enlarged before it is noised again",
        deviations="real latents are reduced by means over areas, not encoded at every size; the "
        "student's own rollouts for a share of the updates; one head per layer",
    )
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(learning_rate=3e-4, critic_learning_rate=8e-4)
    )
    gan: GanConfig = field(default_factory=lambda: GanConfig(weight=2e-2, features="teacher"))
    patches: PatchConfig = field(default_factory=PatchConfig)
    smallest: float = 0.75
    """Height and width of the first step's sample in the named recipe, a share of the finished
    one; grid.sizes has the ladder."""
    data_share: float = 0.5
    """Share of updates that start from reduced, enlarged and noised pictures (1 as released);
    the others are the student's own rollouts."""
    critic_guidance: float = 1.0
    """The critic's guidance scale in the score difference."""

    def __post_init__(self) -> None:
        within("smallest", self.smallest, 0.1, 1.0)
        within("data-share", self.data_share, 0.0, 1.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, gan, rollout = self.match, self.gan, self._rollout(frame)
        judge = gan.judge(frame, rollout)
        matching = ScoreDifference(
            rollout,
            guided_teacher(frame),
            Guided(ConstantGuidance(self.critic_guidance), Role.CRITIC),
            tau=match.tau,
            normaliser=match.normaliser,
        )
        critic = match.critic(
            rollout,
            extras=(gan.extra(judge),) if gan.weight else (),
            modules=(HEADS,) if gan.weight else (),
            null_share=NULL_SHARE if self.critic_guidance != 1.0 else 0.0,
        )
        gan_terms = (gan.term(judge),) if gan.weight else ()
        return (
            Stage(
                name="scale-wise matching",
                num_steps=match.num_steps,
                terms=(Weighted(matching), *gan_terms, *self.patches.terms(frame, rollout)),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=critic,
                uses_data=True,
            ),
        )

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        return self.gan.modules(frame) if self.gan.weight else {}

    def grid(self, grid: GridConfig) -> GridConfig:
        last = max(1, grid.num_steps - 1)
        rise = (1.0 - self.smallest) / last
        sizes = [self.smallest + rise * index for index in range(grid.num_steps - 1)]
        return dataclasses.replace(grid, stochasticity=1.0, sizes=(*sizes, 1.0))

    def _rollout(self, frame: Frame) -> Rollout:
        own = self.match.rollout(frame)
        if not self.data_share:
            return own
        return Either(DataRollout(frame.grid, EXITS[self.match.exit]), own, self.data_share)
