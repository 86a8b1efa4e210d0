"""Times of two engines, taken in turns so that a busy machine slows both alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fewstep.runtime.manifest import Measured

FEWEST, USUAL, MOST = 3, 7, 41
"""Repeats: in any case, of what is slow, and of what is quick."""
BUDGET_S, PATIENCE_S = 4.0, 30.0
"""Per comparison, both sides together, after which no more than `USUAL` and `FEWEST` are made."""


@dataclass(frozen=True, slots=True)
class Times:
    """What was found.

    Attributes:
        what: Component, or "picture".
        where: Shapes and settings, for people.
        reference_ms: Median.
        candidate_ms: Median.
        ratio: Median of the ratios of neighbours, candidate by reference.
        low: Lower quartile of the ratios.
        high: Upper quartile.
        repeats: Of each side.
    """

    what: str
    where: str
    reference_ms: float
    candidate_ms: float
    ratio: float
    low: float
    high: float
    repeats: int

    def measured(self, limit: float | None) -> tuple[Measured, ...]:
        """For the manifest."""
        where = (
            f"{self.where}, {self.repeats} in turns, quartiles {self.low:.2f} to {self.high:.2f}"
        )
        return (
            Measured(what=self.what, where=self.where, value=self.candidate_ms, unit="ms"),
            Measured(
                what=self.what, where=where, value=self.ratio, unit="ratio of time", limit=limit
            ),
        )


def compare_times(
    what: str, where: str, reference: Callable[[int], object], candidate: Callable[[int], object]
) -> Times:
    """Run both in turns.

    Args:
        what: Component, or "picture".
        where: For people.
        reference: Makes one call; told how many were made before.
        candidate: The same.
    """
    for call in (reference, candidate):
        call(0)
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while is_worth_another(len(pairs), time.perf_counter() - start):
        index = len(pairs) + 1
        if index % 2:  # whoever comes second finds the caches warmer
            first, second = _seconds(reference, index), _seconds(candidate, index)
        else:
            second, first = _seconds(candidate, index), _seconds(reference, index)
        pairs.append((first, second))
    times = np.array(pairs)
    ratios = times[:, 1] / times[:, 0]
    low, ratio, high = (float(v) for v in np.quantile(ratios, (0.25, 0.5, 0.75)))
    medians = np.median(times, axis=0) * 1e3
    return Times(what, where, float(medians[0]), float(medians[1]), ratio, low, high, len(pairs))


def is_worth_another(repeats: int, seconds: float) -> bool:
    """Whether to repeat once more, after so many repeats in so long."""
    if repeats < FEWEST:
        return True
    return repeats < (MOST if seconds < BUDGET_S else USUAL if seconds < PATIENCE_S else 0)


def _seconds(call: Callable[[int], object], index: int) -> float:
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start
