"""An analytic teacher: a Gaussian mixture whose denoiser, score and density are known exactly.

The oracle of tests and docs: what a perfect network would answer, with no network. Plain arithmetic
on whatever array it is given, so `denoise` and `score` also work on torch tensors (with gradients)
when the mixture is made of them; torch is not imported.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.errors import ConfigError
from fewstep.noise_schedule import CLEAN
from fewstep.sampling import A, Coefficients


@dataclass(frozen=True, slots=True, eq=False)
class GaussianMixture:
    """A mixture of K round Gaussians in D dimensions, D small (at most some dozens).

    Attributes:
        means: Shape (K, D), numpy or torch: the kind of array that samples will be.
        variances: K values above 0.
        weights: K values above 0 that sum to 1.
        labels: The class of each component; empty means that each is its own class.
    """

    means: Any
    variances: Any
    weights: Any
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = [len(self.means), len(self.variances), len(self.weights)]
        sizes += [len(self.labels)] if self.labels else []
        if len(set(sizes)) != 1:
            raise ConfigError(f"a mixture needs equally many of each part, got {sizes}")
        if min(float(value) for value in (*self.variances, *self.weights)) <= 0.0:
            raise ConfigError("a mixture's variances and weights must be above 0; drop such a part")
        total = sum(float(w) for w in self.weights)
        if abs(total - 1.0) > 1e-6:
            raise ConfigError(f"a mixture's weights must sum to 1, got {total:g}")

    def only(self, label: int) -> "GaussianMixture":
        """The mixture of one class: its components, weights scaled to sum to 1.

        Raises:
            ConfigError: No component has this label.
        """
        names = self.labels or tuple(range(len(self.weights)))
        chosen = [k for k, name in enumerate(names) if name == label]
        if not chosen:
            raise ConfigError(f"no component has label {label}; use one of {sorted(set(names))}")
        total = sum(float(self.weights[k]) for k in chosen)
        return GaussianMixture(
            self.means[chosen],
            [self.variances[k] for k in chosen],
            [float(self.weights[k]) / total for k in chosen],
            (label,) * len(chosen),
        )

    def denoise(self, sample: A, level: Coefficients, labels: A | None = None) -> A:
        """Expected clean data given a noisy sample, E[x0 | x_t].

            x0 = sum_k p(k | x_t) (m_k + alpha v_k / (alpha^2 v_k + sigma^2) (x_t - alpha m_k))

        Args:
            sample: Noisy samples, shape (B, ...) with D values each.
            level: Its alpha and sigma; numbers, or arrays of B values.
            labels: The class of each sample, shape (B,); None is unconditional.

        Returns:
            Predicted clean data, the shape of `sample`.

        Raises:
            ConfigError: A label that no component has.
        """
        batch: Any = sample
        flat = batch.reshape(len(batch), -1)
        alpha, sigma = _column(level.alpha), _column(level.sigma)
        if labels is None:
            return self._flat_x0(flat, alpha, sigma).reshape(batch.shape)
        wanted: Any = labels
        x0: Any = 0.0
        for label in sorted({int(value) for value in wanted}):
            is_label = (wanted == label)[:, None]
            x0 = x0 + is_label * self.only(label)._flat_x0(flat, alpha, sigma)
        return x0.reshape(batch.shape)

    def _flat_x0(self, flat: Any, alpha: Any, sigma: Any) -> Any:
        spreads = [alpha**2 * variance + sigma**2 for variance in self.variances]
        offsets = [flat - alpha * mean for mean in self.means]
        x0: Any = 0.0
        for k, share in enumerate(self._shares(offsets, spreads)):
            pull = alpha * self.variances[k] / spreads[k]
            x0 = x0 + share * (self.means[k] + pull * offsets[k])
        return x0

    def _shares(self, offsets: list[Any], spreads: list[Any]) -> list[Any]:
        """p(k | x_t), K arrays of shape (B, 1). Only operators that numpy and torch share."""
        heights = [
            -0.5 * (offset**2).sum(-1)[:, None] / spread
            for offset, spread in zip(offsets, spreads, strict=True)
        ]
        top = functools.reduce(_larger, heights)
        half_size = offsets[0].shape[-1] / 2
        masses = [
            float(weight) * (spreads[0] / spread) ** half_size * math.e ** (height - top)
            for weight, spread, height in zip(self.weights, spreads, heights, strict=True)
        ]
        total = sum(masses)
        return [mass / total for mass in masses]

    def score(self, sample: A, level: Coefficients, labels: A | None = None) -> A:
        """Gradient of the log density of noisy samples: `(alpha x0 - x_t) / sigma^2` (Tweedie)."""
        batch: Any = sample
        column = (-1, *[1] * (len(batch.shape) - 1))
        alpha, sigma = _column(level.alpha, column), _column(level.sigma, column)
        return (alpha * self.denoise(batch, level, labels) - batch) / sigma**2

    def log_density(self, sample: np.ndarray, level: Coefficients = CLEAN) -> np.ndarray:
        """Log density of noisy samples (clean ones by default), numpy only.

        Args:
            sample: Shape (B, D).
            level: Its alpha and sigma, numbers.

        Returns:
            Shape (B,), float64.
        """
        means, variances, weights = (
            np.asarray(part, dtype=np.float64)
            for part in (self.means, self.variances, self.weights)
        )
        spreads = level.alpha**2 * variances + level.sigma**2
        squares = ((sample[:, None, :] - level.alpha * means) ** 2).sum(-1)
        norms = 0.5 * means.shape[1] * np.log(2 * np.pi * spreads)
        return np.logaddexp.reduce(np.log(weights) - norms - 0.5 * squares / spreads, axis=1)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Clean samples.

        Args:
            count: How many.
            seed: Of numpy's default generator.

        Returns:
            Shape (count, D), float64 numpy, whatever the mixture is made of.
        """
        generator = np.random.default_rng(seed)
        means, variances, weights = (
            np.asarray(part, dtype=np.float64)
            for part in (self.means, self.variances, self.weights)
        )
        chosen = generator.choice(len(weights), size=count, p=weights / weights.sum())
        noise = generator.standard_normal((count, means.shape[1]))
        return means[chosen] + np.sqrt(variances[chosen])[:, None] * noise


def _column(value: Any, shape: tuple[int, ...] = (-1, 1)) -> Any:
    return value if isinstance(value, int | float) else value.reshape(shape)


def _larger(first: Any, second: Any) -> Any:
    """Elementwise maximum in operators only; keeps the exponentials of a softmax below 1."""
    return (first + second + abs(first - second)) / 2
