"""Where on the schedule teacher and critic are asked: a span of the clock and a density on it.

Positions run from 0 (clean) to 1 (noise) of the schedule's clock.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from fewstep.noise_schedule import Flow, Level, NoiseSchedule, Vp
from fewstep.trainer.levels import position_of


class Density(ABC):
    """Interface: a law on [0, 1] by its quantile function."""

    @abstractmethod
    def quantile(self, u: Tensor, progress: float, schedule: NoiseSchedule) -> Tensor:
        """Inverse cumulative distribution at u in [0, 1), float64."""


@dataclass(frozen=True, slots=True)
class Uniform(Density):
    """Even, then time-shifted: shift above 1 moves positions toward noise."""

    shift: float = 1.0

    def quantile(self, u: Tensor, progress: float, schedule: NoiseSchedule) -> Tensor:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


@dataclass(frozen=True, slots=True)
class LogitNormal(Density):
    """sigmoid(mean + std * normal): SD3's density (arXiv:2403.03206, sec. 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Tensor, progress: float, schedule: NoiseSchedule) -> Tensor:
        normal = torch.special.ndtri(u.clamp(1e-7, 1.0 - 1e-7))
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True, slots=True)
class Karras(Density):
    """EDM's sampling grid as a density over sigma / alpha, as positions of the schedule's clock.

    SiD draws its noise levels so: rho 7 between 0.002 and 80 (arXiv:2404.04057, app. C).
    """

    rho: float = 7.0
    low: float = 0.002
    high: float = 80.0

    def quantile(self, u: Tensor, progress: float, schedule: NoiseSchedule) -> Tensor:
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        karras_sigma = (low + u * (high - low)) ** self.rho
        if isinstance(schedule, Flow):
            return karras_sigma / (1.0 + karras_sigma)
        assert isinstance(schedule, Vp)
        table = schedule.sigmas()
        sigma = (karras_sigma / (1.0 + karras_sigma.square()).sqrt()).numpy()
        clock = np.interp(sigma, table, np.arange(len(table)))
        return torch.from_numpy(clock / (len(table) - 1))


@dataclass(frozen=True, slots=True)
class BetaAnnealed(Density):
    """Beta(1 + a, 1 + b), a and b falling linearly to 0 (uniform) over the stage: DMDR's renoise.

    Starts at high noise: a above b.
    """

    a: float = 3.0
    b: float = 0.0

    def quantile(self, u: Tensor, progress: float, schedule: NoiseSchedule) -> Tensor:
        left = max(0.0, 1.0 - progress)
        return torch.from_numpy(
            np.asarray(betaincinv(1.0 + self.a * left, 1.0 + self.b * left, u.numpy()))
        )


class Span(ABC):
    """Interface: the part of the clock that may be asked, given the student's step t -> s."""

    @abstractmethod
    def bounds(self, t: float, s: float) -> tuple[float, float]:
        """(low, high) positions."""


@dataclass(frozen=True, slots=True)
class Full(Span):
    """All of the clock."""

    def bounds(self, t: float, s: float) -> tuple[float, float]:
        return 0.0, 1.0


@dataclass(frozen=True, slots=True)
class Above(Span):
    """Noisier than the student's step, (t, 1]; the whole clock at t = 1, where nothing is."""

    def bounds(self, t: float, s: float) -> tuple[float, float]:
        return (t, 1.0) if t < 0.99 else (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Below(Span):
    """Cleaner than the student's step, (0, t]."""

    def bounds(self, t: float, s: float) -> tuple[float, float]:
        return 0.0, t


@dataclass(frozen=True, slots=True)
class AboveEnd(Span):
    """Noisier than where the student's step ends, (s + margin, 1]: Phased DMD's reverse nesting."""

    margin: float = 0.02

    def bounds(self, t: float, s: float) -> tuple[float, float]:
        return min(s + self.margin, 0.999) if s > 0.0 else 0.0, 1.0


@dataclass(frozen=True, slots=True)
class InsideStep(Span):
    """Between the ends of the student's step, (s + margin, t - margin]: TDM's separate spans."""

    margin: float = 0.02

    def bounds(self, t: float, s: float) -> tuple[float, float]:
        low = s + self.margin
        return low, max(low, t - self.margin)


@dataclass(frozen=True, slots=True)
class TauLaw:
    """A span, a density stretched over it, and hard limits.

    Attributes:
        span: Relative to the student's step.
        density: On the span.
        low: Lowest position ever asked.
        high: Highest.
    """

    span: Span = Full()
    density: Density = Uniform()
    low: float = 0.02
    high: float = 0.98

    def positions(
        self, u: Tensor, now: Level, following: Level, schedule: NoiseSchedule, progress: float
    ) -> Tensor:
        """Positions for uniform draws.

        Args:
            u: Shape (B,), in [0, 1).
            now: The student's level.
            following: Where its step ends.
            schedule: Of the base.
            progress: Share of the stage done, for annealed densities.

        Returns:
            Shape (B,), float64.
        """
        low, high = self.span.bounds(position_of(schedule, now), position_of(schedule, following))
        low, high = max(low, self.low), min(high, self.high)
        high = max(low, high)
        within = self.density.quantile(u.double().cpu(), progress, schedule)
        return (low + (high - low) * within).to(u.device)
