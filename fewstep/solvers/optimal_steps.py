"""Optimal step grids by dynamic programming over a fine teacher trajectory.

    z_k[j] = Euler step from z_{k-1}[i] at level i to level j, for the i < j whose result is
             nearest to the teacher's state at j

The k-step grid is traced back from z_k at the last level. Exactly k steps (the authors' code also
keeps cheaper solutions of fewer), one cost for the whole batch (theirs searches per picture and
takes a median), no randomness.

Source:
    Pei et al. 2025 (OSS), arXiv:2503.21774, alg. 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level
from fewstep.sampling import A
from fewstep.solvers.teacher_path import euler_step, mean_square, teacher_states
from fewstep.trajectory import Denoiser


@dataclass(frozen=True, slots=True)
class FoundGrid:
    """One step count's grid.

    Attributes:
        indices: Which of the teacher's levels, k + 1 values from 0 to N.
        levels: Those levels.
        error: Mean squared difference of its result to the teacher's.
        even_error: The same of the evenly spaced choice of k steps; never below `error`.
    """

    indices: tuple[int, ...]
    levels: tuple[Level, ...]
    error: float
    even_error: float


def count_calls(num_teacher_steps: int, step_counts: Sequence[int]) -> int:
    """Network calls of `optimal_grids`, for progress bars."""
    num, most = num_teacher_steps, max(step_counts)
    search = 1 + sum(num - k for k in range(1, most))
    return num + search + sum(step_counts)


def optimal_grids(
    denoise: Denoiser[A], sample: A, levels: Sequence[Level], step_counts: Sequence[int]
) -> dict[int, FoundGrid]:
    """The grids of several step counts by one search.

    Args:
        denoise: The teacher, guidance included.
        sample: Noise at the first level, already scaled, a batch. Memory: three times N of these.
        levels: The teacher's N + 1 descending levels, which grids choose from.
        step_counts: Each 1 to N.

    Raises:
        ConfigError: No step counts, or one outside 1 to N.
    """
    num = len(levels) - 1
    if not step_counts or min(step_counts) < 1 or max(step_counts) > num:
        raise ConfigError(
            f"step counts must be 1 to the teacher's {num}, got {list(step_counts)}; "
            "give a finer teacher or fewer steps"
        )
    teacher = teacher_states(denoise, sample, levels)
    paths = _search(denoise, teacher, levels, max(step_counts))
    found = {}
    for count in sorted(set(step_counts)):
        indices, error = paths[count]
        even = even_indices(num, count)
        even_error = mean_square(_run(denoise, sample, levels, even), teacher[-1])
        if even_error <= error:  # the search keeps one state per level: rarely, it misses this
            indices, error = even, even_error
        found[count] = FoundGrid(indices, tuple(levels[i] for i in indices), error, even_error)
    return found


def even_indices(num_levels: int, num_steps: int) -> tuple[int, ...]:
    """`num_steps` equal parts of a fine grid, rounded half up."""
    return tuple((2 * i * num_levels + num_steps) // (2 * num_steps) for i in range(num_steps + 1))


def _search(
    denoise: Denoiser[A], teacher: list[A], levels: Sequence[Level], most: int
) -> dict[int, tuple[tuple[int, ...], float]]:
    """Step count -> (indices, error), for 1 to `most` steps."""
    num = len(levels) - 1
    reached: dict[int, Any] = {0: teacher[0]}
    parents: list[dict[int, int]] = []
    paths = {}
    for count in range(1, most + 1):
        reached, costs, chosen = _extend(denoise, reached, teacher, levels)
        parents.append(chosen)
        paths[count] = (_trace(parents, num), costs[num])
    return paths


def _extend(
    denoise: Denoiser[A], reached: dict[int, A], teacher: list[A], levels: Sequence[Level]
) -> tuple[dict[int, A], dict[int, float], dict[int, int]]:
    """One more step: the best state at each later level, its cost and where it came from."""
    states: dict[int, A] = {}
    costs: dict[int, float] = {}
    chosen: dict[int, int] = {}
    for i in sorted(reached):
        if i == len(levels) - 1:
            continue
        x0 = denoise(reached[i], levels[i])
        for j in range(i + 1, len(levels)):
            moved = euler_step(reached[i], x0, levels[i], levels[j])
            cost = mean_square(moved, teacher[j])
            if j not in costs or cost < costs[j]:
                states[j], costs[j], chosen[j] = moved, cost, i
    return states, costs, chosen


def _trace(parents: list[dict[int, int]], end: int) -> tuple[int, ...]:
    indices = [end]
    for chosen in reversed(parents):
        indices.append(chosen[indices[-1]])
    return tuple(reversed(indices))


def _run(denoise: Denoiser[A], sample: A, levels: Sequence[Level], indices: Sequence[int]) -> A:
    for i, j in pairwise(indices):
        sample = euler_step(sample, denoise(sample, levels[i]), levels[i], levels[j])
    return sample
