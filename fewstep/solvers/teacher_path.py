"""The teacher's trajectory on a fine grid: what every search and fit here is measured against."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewstep.noise_schedule import Level
from fewstep.sampling import A, combine, step_weights
from fewstep.trajectory import Denoiser


def euler_step(sample: A, x0: A, now: Level, following: Level) -> A:
    """The deterministic step (Euler, DDIM)."""
    return combine(step_weights(now, following, following), sample, x0, None)


def teacher_states(denoise: Denoiser[A], sample: A, levels: Sequence[Level]) -> list[A]:
    """Euler states at every level, the first being the given sample.

    Args:
        denoise: The teacher, guidance included.
        sample: Noise at the first level, already scaled, a batch.
        levels: N + 1 descending levels.

    Returns:
        N + 1 states.
    """
    states = [sample]
    for now, following in zip(levels, levels[1:], strict=False):
        states.append(euler_step(states[-1], denoise(states[-1], now), now, following))
    return states


def mean_square(first: Any, second: Any) -> float:
    """Mean squared difference of two arrays, over all of the batch."""
    difference = first - second
    return float((difference * difference).mean())


def as_vector(array: Any) -> np.ndarray:
    """All values of a numpy or torch array as one float64 vector."""
    if hasattr(array, "detach"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array, dtype=np.float64).reshape(-1)
