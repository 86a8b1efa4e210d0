"""A term: one loss of a stage, with its weight, its ramp and where on the schedule it counts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fewstep.trainer.context import StepContext

Metrics = dict[str, float]
TermLoss = tuple[Tensor, Metrics]


class Term(ABC):
    """Interface: a scalar loss of one update of the student."""

    needs_data: bool = False
    """Whether it compares with real latents."""

    @abstractmethod
    def loss(self, context: StepContext) -> TermLoss:
        """The loss, and what to log."""


@dataclass(frozen=True, slots=True)
class ByExpert(Term):
    """The same loss for several students, each with roles of its own (MSD: its critic).

    Attributes:
        parts: One term per expert of the route.
    """

    parts: tuple[Term, ...]

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.needs_data for part in self.parts)

    def loss(self, context: StepContext) -> TermLoss:
        assert context.expert is not None  # a stage that rotates its experts names one per update
        return self.parts[context.expert].loss(context)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A term as a stage uses it.

    Attributes:
        term: The loss.
        weight: Its factor.
        delay: Share of the stage before it begins.
        ramp: Share of the stage over which its weight then rises from 0.
    """

    term: Term
    weight: float = 1.0
    delay: float = 0.0
    ramp: float = 0.0

    def weight_at(self, progress: float) -> float:
        """The factor at a progress, 0 to 1."""
        if progress < self.delay:
            return 0.0
        if progress < self.delay + self.ramp:
            return self.weight * (progress - self.delay) / self.ramp
        return self.weight
