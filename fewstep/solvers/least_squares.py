"""Non-linear least squares by finite differences: any pipeline can be fitted, without gradients.

Levenberg-Marquardt with Marquardt's scaling. Deterministic; every evaluation is one rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Residuals = Callable[[np.ndarray], np.ndarray]
"""Parameters (P,) -> residuals (M,), float64."""

DIFFERENCE = 2e-3
"""Of the parameters, which are logarithms and rates of order 1; networks answer in float32."""
LARGEST_MOVE = 0.5
ENOUGH = 1e-3
"""Relative gain of a round below which fitting stops."""
DAMPINGS = 6


@dataclass(frozen=True, slots=True)
class Fitted:
    """Where the fit ended.

    Attributes:
        values: Parameters, shape (P,).
        cost: Sum of squared residuals there; never above the start's.
        num_evaluations: Rollouts it took.
    """

    values: np.ndarray
    cost: float
    num_evaluations: int


def fit_least_squares(residuals: Residuals, start: np.ndarray, *, num_rounds: int) -> Fitted:
    """Minimise the sum of squared residuals.

    Args:
        residuals: Called P + a few times per round.
        start: Parameters to start from, shape (P,).
        num_rounds: At most this many linearisations.
    """
    counter = _Counter(residuals)
    values, now = np.array(start, dtype=np.float64), counter(start)
    damping = 1e-2
    for _ in range(num_rounds):
        before = float(now @ now)
        jacobian = _jacobian(counter, values, now)
        for _ in range(DAMPINGS):
            tried = values + _move(jacobian, now, damping)
            there = counter(tried)
            if float(there @ there) < before:  # false for NaN too
                values, now, damping = tried, there, max(damping / 5.0, 1e-8)
                break
            damping *= 8.0
        if before - float(now @ now) <= ENOUGH * before:
            break
    return Fitted(values, float(now @ now), counter.count)


class _Counter:
    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals
        self.count = 0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        self.count += 1
        return self._residuals(values)


def _jacobian(residuals: Residuals, values: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Forward differences, shape (P, M)."""
    rows = np.empty((len(values), len(now)))
    for k in range(len(values)):
        moved = values.copy()
        moved[k] += DIFFERENCE
        rows[k] = (residuals(moved) - now) / DIFFERENCE
    return rows


def _move(jacobian: np.ndarray, now: np.ndarray, damping: float) -> np.ndarray:
    curvature = jacobian @ jacobian.T
    diagonal = np.diag(curvature)
    floor = 1e-9 * max(float(diagonal.max()), 1e-30)
    damped = curvature + damping * np.diag(np.maximum(diagonal, floor))
    move = np.linalg.lstsq(damped, -(jacobian @ now), rcond=None)[0]
    return np.clip(move, -LARGEST_MOVE, LARGEST_MOVE)
