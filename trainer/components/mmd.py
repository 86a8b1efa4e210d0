"""Maximum mean discrepancy of two sets of features, without bias; pure functions.

Source:
    Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class MmdKernel(ABC):
    """Interface: how alike features are."""

    @abstractmethod
    def gram(self, features: Tensor) -> Tensor:
        """All pairs of features (..., n, D): shape (..., n, n)."""


@dataclass(frozen=True, slots=True)
class LinearKernel(MmdKernel):
    """<x, y> / D: compares means alone."""

    def gram(self, features: Tensor) -> Tensor:
        return features @ features.mT / features.shape[-1]


@dataclass(frozen=True, slots=True)
class RbfKernel(MmdKernel):
    """mean over scales s of exp(-|x - y|^2 / (2 s^2 m)), m the mean |x - y|^2: all moments.

    Attributes:
        scales: Of the width, against the features' own spread.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 2.0)

    def gram(self, features: Tensor) -> Tensor:
        squares = features.square().sum(dim=-1)
        products = features @ features.mT
        distances = (squares[..., :, None] + squares[..., None, :] - 2.0 * products).clamp(min=0.0)
        spread = distances.detach().mean(dim=(-1, -2), keepdim=True).clamp(min=1e-12)
        parts = [(-distances / (2.0 * s * s * spread)).exp() for s in self.scales]
        return torch.stack(parts).mean(dim=0)


def paired_mmd(fake: Tensor, real: Tensor, kernel: MmdKernel) -> Tensor:
    """MMD^2 of two sets whose rows belong together, unbiased.

        1 / (n (n - 1)) sum_{i != j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    0 for equal sets, 0 in the mean for equal distributions (so it may be below 0), above 0
    otherwise.

    Args:
        fake: Shape (..., n, D), n at least 2.
        real: The same shape.
        kernel: Linear or RBF.

    Returns:
        Shape (...).

    Source:
        Gretton et al. 2012, JMLR 13, lemma 6.
    """
    count = fake.shape[-2]
    gram = kernel.gram(torch.cat([fake, real], dim=-2))
    cross = gram[..., :count, count:]
    pairs = gram[..., :count, :count] + gram[..., count:, count:] - cross - cross.mT
    sums = pairs.sum(dim=(-1, -2)) - pairs.diagonal(dim1=-1, dim2=-2).sum(dim=-1)
    return sums / (count * (count - 1))


def token_mean_distance(fake: Tensor, real: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance of each picture's mean token from its partner's.

        mean over channels of sqrt(d^2 + c^2) - c,   d = mean_tokens(fake) - mean_tokens(real)

    Args:
        fake: Shape (B, N, C).
        real: Shape (B, N, C).
        c: Below it the distance is quadratic.

    Source:
        SwD, arXiv:2503.16397, patch MMD with a linear kernel, as released.
    """
    d = fake.mean(dim=1) - real.mean(dim=1)
    return ((d.square() + c * c).sqrt() - c).mean()
