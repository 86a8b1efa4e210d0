"""Maximum mean discrepancy: the student's samples and real ones must agree on their mean features.

Features come from random untrained networks (Embedding Loss) or from a block of the teacher at
noised samples (SwD). Fake and real are of the same prompts, row by row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.errors import ConfigError
from fewstep.trainer.components.features import FeatureSource, as_tokens
from fewstep.trainer.components.kernels import Kernel, Renoise
from fewstep.trainer.components.mmd import (
    LinearKernel,
    MmdKernel,
    RbfKernel,
    paired_mmd,
    token_mean_distance,
)
from fewstep.trainer.components.random_networks import random_networks
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.sizes import real_like
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels

LARGEST_SEED = 2**31


@dataclass(frozen=True, slots=True)
class EmbeddingMmd(Term):
    """MMD in the feature spaces of random networks, drawn anew at every update.

    Pairs are those within one part of a batch: cutting it finer changes the variance, not the mean.

    Attributes:
        rollout: Whose clean predictions are compared.
        kernel: On embeddings.
        num_networks: K.
        width: Their hidden channels.
        name: Of its draws.

    Source:
        Ying et al. 2026 (Embedding Loss), arXiv:2604.22379.
    """

    rollout: Rollout
    kernel: MmdKernel = LinearKernel()
    num_networks: int = 8
    width: int = 64
    name: str = "embedding"
    needs_data = True

    def loss(self, context: StepContext) -> TermLoss:
        fake = context.rolled(self.rollout).x0.float()
        _at_least_two(len(fake))
        real = real_like(context, tuple(fake.shape[1:]))
        networks = random_networks(
            self.num_networks,
            fake.shape[1],
            self.width,
            seed=context.draws.shared_integer(f"{self.name}/networks", 0, LARGEST_SEED),
            device=fake.device,
        )
        parts = [paired_mmd(network(fake), network(real), self.kernel) for network in networks]
        loss = torch.stack(parts).mean()
        return loss, {f"loss/{self.name}": loss.item()}


class PatchDistance(ABC):
    """Interface: how far apart two batches of tokens are, (B, N, C) each."""

    @abstractmethod
    def of(self, fake: Tensor, real: Tensor) -> Tensor:
        """A scalar."""


@dataclass(frozen=True, slots=True)
class TokenMeans(PatchDistance):
    """`token_mean_distance`: SwD's default."""

    c: float = 1e-3

    def of(self, fake: Tensor, real: Tensor) -> Tensor:
        return token_mean_distance(fake, real, self.c)


@dataclass(frozen=True, slots=True)
class TokenSets(PatchDistance):
    """MMD between each picture's tokens and its partner's."""

    kernel: MmdKernel = RbfKernel()

    def of(self, fake: Tensor, real: Tensor) -> Tensor:
        return paired_mmd(fake, real, self.kernel).mean()


@dataclass(frozen=True, slots=True)
class PatchMmd(Term):
    """The student's tokens in a block of the teacher must be distributed as real ones.

    Fake and real are noised to one level by one noise.

    Attributes:
        source: Where tokens come from: one or several blocks of the frozen teacher.
        rollout: Whose results are compared.
        distance: Of tokens.
        kernel: How they are noised.
        tau: To which level.
        name: Of its probe.

    Source:
        Starodubcev et al. 2025 (SwD), arXiv:2503.16397, patch distribution matching.
    """

    source: FeatureSource
    rollout: Rollout
    distance: PatchDistance = TokenMeans()
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw()
    name: str = "patches"
    needs_data = True

    def loss(self, context: StepContext) -> TermLoss:
        noised = context.question(self.rollout, self.kernel, self.tau, self.name).noised
        x0 = real_like(context, tuple(noised.sample.shape[1:]))
        real_sample = sampling.add_noise(x0, noised.epsilon, noised.levels)
        fakes = self._tokens(context, noised.sample, noised.levels)
        with torch.no_grad():
            reals = self._tokens(context, real_sample, noised.levels)
        pairs = zip(fakes, reals, strict=True)
        loss = torch.stack([self.distance.of(fake, real) for fake, real in pairs]).mean()
        return loss, {f"loss/{self.name}": loss.item()}

    def _tokens(self, context: StepContext, sample: Tensor, levels: Levels) -> list[Tensor]:
        found = self.source.features(context.backbone, sample, levels, context.condition)
        return [as_tokens(feature) for feature in found]


def _at_least_two(count: int) -> None:
    if count < 2:
        raise ConfigError(
            f"the embedding loss compares pairs, but each part of a batch has {count} sample; "
            "lower accumulation or raise batch-size"
        )
