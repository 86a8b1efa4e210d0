"""How much signal and how much noise a sample holds at each timestep: VP, flow and TrigFlow.

    sample = alpha * x0 + sigma * epsilon

A `Level` is one point of a schedule. All arithmetic is float64 on plain Python numbers and numpy
arrays; torch is not imported. A sampler only ever needs the levels of its grid and, where fresh
noise is drawn, the level it passes on the way (`NoiseSchedule.via`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewstep.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Level:
    """One point of a noise schedule.

    Attributes:
        timestep: The network's own clock input.
        alpha: Weight of x0.
        sigma: Weight of epsilon; grows with noise.
    """

    timestep: float
    alpha: float
    sigma: float


CLEAN = Level(timestep=0.0, alpha=1.0, sigma=0.0)
"""The end of every trajectory that finishes at clean data."""

ROUNDING = 1e-5
"""Relative overshoot that is forgiven: float32 tables, and diffusers' 1.5708 for pi / 2."""


class NoiseSchedule(ABC):
    """Interface: the family of levels a model was trained on."""

    @abstractmethod
    def alpha_of_sigma(self, sigma: float) -> float:
        """The alpha that goes with a sigma."""

    @abstractmethod
    def sigma_of_timestep(self, timestep: float) -> float:
        """Sigma at a timestep (not rounded; interpolated where the schedule is a table)."""

    @abstractmethod
    def timestep_of_sigma(self, sigma: float) -> float:
        """Inverse of `sigma_of_timestep`."""

    @abstractmethod
    def via(self, following: Level, stochasticity: float) -> Level:
        """Where the deterministic part of a step stops before fresh noise lifts it to `following`.

        Args:
            following: The level the step ends at.
            stochasticity: 0 stops at `following` (Euler/DDIM: no fresh noise), 1 goes to clean data
                (re-noising as in LCM and DMD2), between is TCD's gamma.
        """

    @abstractmethod
    def uniform_timesteps(self, num_steps: int) -> tuple[float, ...]:
        """Descending timesteps of `num_steps` equal parts, the first at full noise."""

    def level(self, timestep: float, sigma: float | None = None) -> Level:
        """The level at a timestep; pass the grid's own sigma where the two are given together."""
        # plain floats: a numpy scalar in a Level would turn float32 samples into float64
        sigma = float(self.sigma_of_timestep(timestep) if sigma is None else sigma)
        return Level(float(timestep), self.alpha_of_sigma(sigma), sigma)


@dataclass(frozen=True, slots=True)
class Vp(NoiseSchedule):
    """Variance preserving, as Stable Diffusion: alpha^2 + sigma^2 = 1, from a table of betas.

    Attributes:
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: "scaled_linear" (SD: linear in sqrt(beta)) or "linear" (DDPM, PixArt).
        num_train_timesteps: Length of the table.

    Source:
        Ho et al. 2020, arXiv:2006.11239; diffusers DDPMScheduler (same table, there in float32).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    num_train_timesteps: int = 1000

    def sigmas(self) -> np.ndarray:
        """Sigma at every integer timestep, ascending, shape (num_train_timesteps,), float64."""
        count = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        else:
            betas = np.linspace(self.beta_start, self.beta_end, count)
        return np.sqrt(1.0 - np.cumprod(1.0 - betas))

    def alpha_of_sigma(self, sigma: float) -> float:
        sigma = _within(sigma, 1.0, "sigma")
        return math.sqrt(1.0 - sigma * sigma)

    def sigma_of_timestep(self, timestep: float) -> float:
        table = self.sigmas()
        timestep = _within(timestep, len(table) - 1.0, "timestep")
        return float(np.interp(timestep, np.arange(len(table)), table))

    def timestep_of_sigma(self, sigma: float) -> float:
        """The table's ends answer for sigmas beyond them: less noise than timestep 0 is 0."""
        table = self.sigmas()
        sigma = _within(sigma, 1.0, "sigma")
        return float(np.interp(sigma, table, np.arange(len(table))))

    def via(self, following: Level, stochasticity: float) -> Level:
        """TCD's rule: `floor((1 - gamma) * t)` (Zheng et al. 2024, arXiv:2402.19159, alg. 4).

        A step that ends at timestep 0 (TCD's terminal) draws no noise, as there. Between timesteps,
        gamma 1 goes to clean data, as LCM does; diffusers' TCD stops at timestep 0 instead.
        """
        if following.timestep < 1.0 or stochasticity == 0.0:
            return following
        if stochasticity == 1.0:
            return CLEAN
        # float64 makes (1 - 0.3) * 90 a little less than 63; float32 hosts see 63
        return self.level(math.floor((1.0 - stochasticity) * following.timestep + 1e-6))

    def uniform_timesteps(self, num_steps: int) -> tuple[float, ...]:
        """ "trailing" spacing: 4 steps of 1000 are 999, 749, 499, 249."""
        count = self.num_train_timesteps
        if num_steps > count:
            raise ConfigError(f"{num_steps} steps do not fit into {count} timesteps; use fewer")
        return tuple(float(round(count - i * count / num_steps) - 1) for i in range(num_steps))


@dataclass(frozen=True, slots=True)
class Flow(NoiseSchedule):
    """Rectified flow: alpha = 1 - sigma, timestep = num_train_timesteps * sigma.

    `shift` only shapes new grids (`uniform_timesteps`); it is applied there once and nowhere else.
    A timestep becomes a sigma and back without it, so a stored grid cannot be shifted twice.

    Source:
        Esser et al. 2024, arXiv:2403.03206, eq. 23: sigma' = s * sigma / (1 + (s - 1) * sigma).
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def alpha_of_sigma(self, sigma: float) -> float:
        return 1.0 - _within(sigma, 1.0, "sigma")

    def sigma_of_timestep(self, timestep: float) -> float:
        count = self.num_train_timesteps
        return _within(timestep, float(count), "timestep") / count

    def timestep_of_sigma(self, sigma: float) -> float:
        return _within(sigma, 1.0, "sigma") * self.num_train_timesteps

    def via(self, following: Level, stochasticity: float) -> Level:
        """`(1 - gamma) * sigma`: our generalisation of TCD's rule to flow, exact at 0 and 1."""
        if following.sigma == 0.0 or stochasticity == 0.0:
            return following
        if stochasticity == 1.0:
            return CLEAN
        sigma = (1.0 - stochasticity) * following.sigma
        return self.level(self.timestep_of_sigma(sigma), sigma)

    def uniform_timesteps(self, num_steps: int) -> tuple[float, ...]:
        """Equal parts of (0, 1], shifted once: 4 steps at shift 5 are 1000, 937.5, 833.3, 625."""
        even = (1.0 - i / num_steps for i in range(num_steps))
        return tuple(self.num_train_timesteps * shift_sigma(u, self.shift) for u in even)


@dataclass(frozen=True, slots=True)
class TrigFlow(NoiseSchedule):
    """TrigFlow: alpha = cos t, sigma = sin t, t from pi/2 (noise) to 0; data of unit deviation.

    A model trained on data of deviation `sigma_data` sees x0 / sigma_data here.

    Source:
        Lu and Song 2024, arXiv:2410.11081, eq. 4; SANA-Sprint, arXiv:2503.09641.
    """

    sigma_data: float = 0.5

    def alpha_of_sigma(self, sigma: float) -> float:
        sigma = _within(sigma, 1.0, "sigma")
        return math.sqrt(1.0 - sigma * sigma)

    def sigma_of_timestep(self, timestep: float) -> float:
        return math.sin(_within(timestep, math.pi / 2, "timestep"))

    def timestep_of_sigma(self, sigma: float) -> float:
        return math.asin(_within(sigma, 1.0, "sigma"))

    def via(self, following: Level, stochasticity: float) -> Level:
        """`(1 - gamma) * t`: our generalisation of TCD's rule to angles, exact at 0 and 1."""
        if following.sigma == 0.0 or stochasticity == 0.0:
            return following
        if stochasticity == 1.0:
            return CLEAN
        return self.level((1.0 - stochasticity) * following.timestep)

    def uniform_timesteps(self, num_steps: int) -> tuple[float, ...]:
        """Equal parts of (0, pi / 2]."""
        return tuple(math.pi / 2 * (1.0 - i / num_steps) for i in range(num_steps))


def shift_sigma(sigma: float, shift: float) -> float:
    """Flow time shift, `shift * sigma / (1 + (shift - 1) * sigma)`; 1 changes nothing."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def levels_of(
    schedule: NoiseSchedule, timesteps: Sequence[float], sigmas: Sequence[float]
) -> tuple[Level, ...]:
    """The N + 1 levels of a grid of N timesteps and N + 1 sigmas.

    The last level's timestep is the schedule's own for that sigma (0 at clean data).
    """
    if sigmas[-1] == 0.0:
        end = CLEAN
    else:
        end = schedule.level(schedule.timestep_of_sigma(sigmas[-1]), sigmas[-1])
    steps = (schedule.level(t, s) for t, s in zip(timesteps, sigmas[:-1], strict=True))
    return (*steps, end)


def _within(value: float, top: float, what: str) -> float:
    if not -ROUNDING * top <= value <= (1.0 + ROUNDING) * top:
        raise ConfigError(f"{what} {value:g} is outside this schedule; use 0 to {top:g}")
    return float(min(max(value, 0.0), top))
