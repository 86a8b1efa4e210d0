"""Embedding Loss: distribution matching, and real pictures by way of random networks, no GAN."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.trainer.components.embedding_mmd import EmbeddingMmd
from fewstep.trainer.components.mmd import LinearKernel, MmdKernel, RbfKernel
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

KERNELS: dict[str, MmdKernel] = {"linear": LinearKernel(), "rbf": RbfKernel()}


@dataclass(frozen=True, kw_only=True)
class EmbeddingLoss(Method):
    """Ying et al. 2026: a discrepancy in the feature spaces of untrained networks."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="embedding-loss",
        summary="dmd2, and mean features of untrained networks must be those of real pictures",
        paper="Embedding Loss, arXiv:2604.22379",
        needs="prompts and pictures",
        num_steps=1,
        artefact="LoRA",
        equation="grad of dmd2 + w mean_k MMD^2(phi_k(x0), phi_k(real)), phi_k random networks",
        deviations="networks are drawn anew at every update; unbiased MMD of pairs of one "
        "prompt; on latents, not on pixels",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    weight: float = 1.0
    """Of the embedding loss, against distribution matching."""
    kernel: Literal["linear", "rbf"] = "linear"
    """linear compares mean features, rbf their whole distribution."""
    num_networks: int = 8
    """Untrained networks per update, of four architectures in turn."""
    network_width: int = 64
    """Their hidden channels."""

    def __post_init__(self) -> None:
        above("weight", self.weight, 0.0)
        at_least("num-networks", self.num_networks, 1)
        at_least("network-width", self.network_width, 1)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, rollout = self.match, self.match.rollout(frame)
        matching = ScoreDifference(
            rollout, guided_teacher(frame), tau=match.tau, normaliser=match.normaliser
        )
        embedding = EmbeddingMmd(
            rollout, KERNELS[self.kernel], self.num_networks, self.network_width
        )
        return (
            Stage(
                name="matching with embeddings",
                num_steps=match.num_steps,
                terms=(Weighted(matching), Weighted(embedding, self.weight)),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(rollout),
                uses_data=True,
            ),
        )

    def check(self, config: "TrainConfig") -> None:
        if config.batch_size // config.accumulation < 2:
            raise ConfigError(
                "the embedding loss compares pairs of samples, but each part of a batch has one; "
                "lower accumulation or raise batch-size"
            )
