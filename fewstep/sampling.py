"""Predictions to x0 and back, and the one step function every host calls or unrolls.

Plain arithmetic on whatever array it is given: numpy and torch alike. A step is linear in sample,
x0 and noise with three float64 weights (`step_weights`), which is all an exported graph needs.
Knows nothing of models, guidance or where noise comes from.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level

Prediction = Literal["epsilon", "v", "flow", "x0", "trigflow"]


class Array(Protocol):
    """What numpy arrays and torch tensors share."""

    def __mul__(self, other: float, /) -> Self: ...
    def __rmul__(self, other: float, /) -> Self: ...
    def __add__(self, other: Self, /) -> Self: ...
    def __sub__(self, other: Self, /) -> Self: ...
    def __truediv__(self, other: float, /) -> Self: ...
    def clip(self, low: float, high: float, /) -> Self: ...


A = TypeVar("A", bound=Array)


class Coefficients(Protocol):
    """Anything with an alpha and a sigma: a `Level`, or one per sample of a training batch."""

    @property
    def alpha(self) -> Any: ...
    @property
    def sigma(self) -> Any: ...


def epsilon_to_x0(epsilon: A, sample: A, level: Coefficients) -> A:
    """`(sample - sigma * epsilon) / alpha`."""
    return (sample - level.sigma * epsilon) / level.alpha


def v_to_x0(v: A, sample: A, level: Coefficients) -> A:
    """VP v-prediction, `alpha * sample - sigma * v` (Salimans and Ho 2022, app. D)."""
    return level.alpha * sample - level.sigma * v


def velocity_to_x0(velocity: A, sample: A, level: Coefficients) -> A:
    """Flow velocity epsilon - x0: `sample - sigma * velocity`."""
    return sample - level.sigma * velocity


def to_x0(prediction: Prediction, output: A, sample: A, level: Coefficients) -> A:
    """What the network said, as x0.

    Args:
        prediction: What kind of output the network gives.
        output: Its output, any shape; raw, guidance already applied.
        sample: The noisy sample it saw, same shape.
        level: Where on the schedule the sample is.

    Returns:
        Predicted clean data, same shape and dtype.
    """
    if prediction == "x0":
        return output
    if prediction == "epsilon":
        return epsilon_to_x0(output, sample, level)
    if prediction in ("v", "trigflow"):  # TrigFlow: x0 = cos(t) x - sin(t) F, the same arithmetic
        return v_to_x0(output, sample, level)
    if prediction == "flow":
        return velocity_to_x0(output, sample, level)
    raise ConfigError(f"prediction {prediction!r} is unknown; use epsilon, v, flow, x0 or trigflow")


def from_x0(prediction: Prediction, x0: A, sample: A, level: Coefficients) -> A:
    """Inverse of `to_x0`: the output that means this x0 (needs sigma > 0 unless "x0")."""
    if prediction == "x0":
        return x0
    if prediction == "epsilon":
        return (sample - level.alpha * x0) / level.sigma
    if prediction in ("v", "trigflow"):
        return (level.alpha * sample - x0) / level.sigma
    if prediction == "flow":
        return (sample - x0) / level.sigma
    raise ConfigError(f"prediction {prediction!r} is unknown; use epsilon, v, flow, x0 or trigflow")


@dataclass(frozen=True, slots=True)
class StepWeights:
    """A step as a linear map of sample, x0, noise, and the sample and x0 of the call before.

    `previous_*` are zero but for fitted solvers (`recipe_grids.SolverRow`).
    """

    sample: float
    x0: float
    noise: float
    previous_sample: float = 0.0
    previous_x0: float = 0.0

    @property
    def needs_previous(self) -> bool:
        """Whether it looks at the call before."""
        return self.previous_sample != 0.0 or self.previous_x0 != 0.0


TO_CLEAN = StepWeights(sample=0.0, x0=1.0, noise=0.0)
"""The last step of every grid that ends at clean data."""


def step_weights(now: Level, following: Level, via: Level) -> StepWeights:
    """The three weights of one step from `now` to `following`.

        epsilon = (sample - alpha_now x0) / sigma_now
        y       = alpha_via x0 + sigma_via epsilon
        next    = a y + sqrt(sigma_next^2 - (a sigma_via)^2) noise,   a = alpha_next / alpha_via

    Args:
        now: Where the sample is; sigma > 0.
        following: Where it goes.
        via: Where the deterministic part stops (`NoiseSchedule.via`): `following` itself gives
            Euler/DDIM, clean data gives re-noising (LCM, DMD2), between is TCD.

    Source:
        Song et al. 2020 (DDIM), Zheng et al. 2024 (TCD, eq. 14) written for any alpha, sigma.
    """
    if now.sigma <= 0.0:
        raise ConfigError("a step cannot start at clean data (sigma 0); drop it from the grid")
    if following.sigma == 0.0:
        return TO_CLEAN
    if via is following or via == following:
        carry, noise = 1.0, 0.0
    else:
        carry = following.alpha / via.alpha
        noise = math.sqrt(max(0.0, following.sigma**2 - (carry * via.sigma) ** 2))
    of_epsilon = carry * via.sigma / now.sigma
    return StepWeights(of_epsilon, carry * via.alpha - of_epsilon * now.alpha, noise)


def step(sample: A, x0: A, now: Level, following: Level, noise: A | None, via: Level) -> A:
    """THE step: move a sample from one level to the next, given predicted clean data.

    Args:
        sample: The noisy sample at `now`, any shape, float32 or float64.
        x0: Predicted clean data, same shape.
        now: Level of `sample`.
        following: Level of the result.
        noise: Standard normal, same shape; not looked at (may be None) in a deterministic step.
        via: `schedule.via(following, stochasticity)`.

    Returns:
        The sample at `following`. At sigma 0 this is exactly `x0`.
    """
    return combine(step_weights(now, following, via), sample, x0, noise)


def combine(
    weights: StepWeights,
    sample: A,
    x0: A,
    noise: A | None,
    previous: tuple[A, A] | None = None,
) -> A:
    """Apply a step's weights.

    Args:
        weights: The step.
        sample: The noisy sample, any shape, float32 or float64.
        x0: Predicted clean data, same shape.
        noise: Standard normal, same shape; not looked at where its weight is 0.
        previous: Sample and x0 of the call before, for weights that look at them.
    """
    if weights == TO_CLEAN:
        return x0
    moved = weights.sample * sample + weights.x0 * x0
    if weights.needs_previous:
        if previous is None:
            raise ConfigError("this step looks at the call before it; pass its sample and x0")
        moved = moved + weights.previous_sample * previous[0] + weights.previous_x0 * previous[1]
    if weights.noise == 0.0:
        return moved
    if noise is None:
        raise ConfigError("this step adds fresh noise; pass noise of the sample's shape")
    return moved + weights.noise * noise


def add_noise(x0: A, noise: A, level: Coefficients) -> A:
    """`alpha * x0 + sigma * noise`: clean data (or an image to start from) at a level."""
    return level.alpha * x0 + level.sigma * noise
