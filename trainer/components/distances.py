"""Distances of a jump from its target, one number per sample."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Distance(ABC):
    """Interface: how far off a sample is."""

    @abstractmethod
    def of(self, error: Tensor) -> Tensor:
        """Per sample, shape (B,), from an error of shape (B, ...)."""


@dataclass(frozen=True, slots=True)
class L2(Distance):
    """Mean square."""

    def of(self, error: Tensor) -> Tensor:
        return error.square().flatten(1).mean(1)


@dataclass(frozen=True, slots=True)
class L1(Distance):
    """Mean of absolute values (SFD)."""

    def of(self, error: Tensor) -> Tensor:
        return error.abs().flatten(1).mean(1)


@dataclass(frozen=True, slots=True)
class PseudoHuber(Distance):
    """Mean of sqrt(e^2 + c^2) - c, value by value (LCM).

    Attributes:
        c: Errors below it count squared, above it by their size.
    """

    c: float = 0.001

    def of(self, error: Tensor) -> Tensor:
        return ((error.square() + self.c**2).sqrt() - self.c).flatten(1).mean(1)


@dataclass(frozen=True, slots=True)
class AdaptiveL2(Distance):
    """Mean square over its own value to the power p, the divisor without gradient (MeanFlow).

        m / stopgrad(m + c)^p,   m = mean e^2

    Attributes:
        p: 0 is the mean square; 1 makes every sample pull alike.
        c: Keeps the divisor above 0.

    Source:
        Geng et al. 2025 (MeanFlow), arXiv:2505.13447, section 4.3; there m is a sum.
    """

    p: float = 1.0
    c: float = 1e-3

    def of(self, error: Tensor) -> Tensor:
        square = error.square().flatten(1).mean(1)
        return square / (square.detach() + self.c) ** self.p
