"""Fits Bespoke RK1 and RK2 solvers to a teacher, without gradients of the network.

The loss is the mean squared difference of the end points; the paper's bound sums local errors
instead, which needs gradients but not whole rollouts. Scales that only repeat what rates can do
(RK1's, and RK2's at midpoints) stay at 1, so n steps have 3n - 1 numbers (RK1), 7n - 1 (RK2).

Source:
    Shaul et al. 2023, arXiv:2310.19075.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.recipe import Grid
from fewstep.sampling import A, StepWeights, combine
from fewstep.solvers.flow_frame import flow_time
from fewstep.solvers.least_squares import fit_least_squares
from fewstep.solvers.scale_time import Method, ScaleTime, plain_scale_time, solver_grid
from fewstep.solvers.teacher_path import as_vector
from fewstep.trajectory import Denoiser

NUM_ROUNDS = 8
LOWEST_SIGMA = 1e-4
"""Nothing is called below this; VP schedules answer with their own first level, which is higher."""


@dataclass(frozen=True, slots=True)
class BespokeFit:
    """A fitted solver.

    Attributes:
        solver: Its numbers.
        grid: The same as a recipe stores it.
        error: Mean squared difference of its result to the teacher's.
        plain_error: The same of Euler or the midpoint method on the levels it started from.
        num_rollouts: What the fit cost, in rollouts of the grid.
    """

    solver: ScaleTime
    grid: Grid
    error: float
    plain_error: float
    num_rollouts: int


def count_calls(num_calls: int, method: Method, num_rounds: int = NUM_ROUNDS) -> int:
    """Network calls of `fit_bespoke` at most (but for rejected steps), for progress bars."""
    return num_calls * (2 + num_rounds * (_size(num_calls, method) + 1))


def fit_bespoke(
    denoise: Denoiser[A],
    sample: A,
    schedule: NoiseSchedule,
    levels: Sequence[Level],
    target: A,
    method: Method,
    *,
    num_rounds: int = NUM_ROUNDS,
) -> BespokeFit:
    """Fit a solver whose steps start at the given levels.

    Args:
        denoise: The network, guidance included.
        sample: Noise at the first level, already scaled, a batch; the more, the better it holds
            for other noise. Several dozen numbers are fitted, so a few pictures suffice.
        schedule: Of the base.
        levels: n + 1 levels to start from; RK2 calls the network 2 n times.
        target: What the teacher makes of the sample.
        method: `RK1` or `RK2` of scale_time.
        num_rounds: Linearisations; each costs one rollout per number fitted, and a few.

    Raises:
        ConfigError: Fewer than 2 levels.
    """
    if len(levels) < 2:
        raise ConfigError(f"a solver needs at least 2 levels, got {len(levels)}")
    plain = plain_scale_time(tuple(flow_time(level) for level in levels), method)
    lowest = flow_time(schedule.level(schedule.timestep_of_sigma(LOWEST_SIGMA)))
    wanted = as_vector(target)

    def residuals(values: np.ndarray) -> np.ndarray:
        grid = solver_grid(_changed(plain, method, values, lowest), method, schedule)
        end = as_vector(run_solver(denoise, sample, schedule, grid))
        return (end - wanted) / np.sqrt(wanted.size)

    start = np.zeros(_size(len(plain.time_rates), method))
    at_start = residuals(start)
    fitted = fit_least_squares(residuals, start, num_rounds=num_rounds)
    solver = _changed(plain, method, fitted.values, lowest)
    return BespokeFit(
        solver=solver,
        grid=solver_grid(solver, method, schedule),
        error=fitted.cost,
        plain_error=float(at_start @ at_start),
        num_rollouts=fitted.num_evaluations + 1,
    )


def run_solver(denoise: Denoiser[A], sample: A, schedule: NoiseSchedule, grid: Grid) -> A:
    """Sample by a grid's solver rows alone.

    Args:
        denoise: The network, guidance included.
        sample: Noise at the first level, already scaled.
        schedule: Of the base.
        grid: With a solver.
    """
    previous: tuple[A, A] | None = None
    for index, row in enumerate(grid.solver):
        level = schedule.level(grid.timesteps[index], grid.sigmas[index])
        x0 = denoise(sample, level)
        weights = StepWeights(row.sample, row.x0, 0.0, row.previous_sample, row.previous_x0)
        sample, previous = combine(weights, sample, x0, None, previous), (sample, x0)
    return sample


def _size(num_calls: int, method: Method) -> int:
    """Lengths, time rates and scale rates per call; RK2 also the scale of every step's end."""
    return 3 * num_calls + (num_calls // 2 if method.calls == 2 else 0)


def _changed(
    plain: ScaleTime, method: Method, values: np.ndarray, lowest: float = 0.0
) -> ScaleTime:
    """The plain solver with its numbers moved: zeros change nothing, any values are valid.

    Calls stay above `lowest`: a VP model knows no time between its first timestep and clean data.
    """
    count = len(plain.time_rates)
    lengths, rates, scale_rates, ends = np.split(values, [count, 2 * count, 3 * count])
    steps = -np.diff(plain.times) * np.exp(lengths)
    steps *= (plain.times[0] - plain.times[-1]) / steps.sum()
    gone = np.cumsum(steps)[:-1]
    if count > 1 and plain.times[0] - gone[-1] < lowest:
        gone *= (plain.times[0] - lowest) / gone[-1]
    inner = plain.times[0] - gone
    times = (plain.times[0], *map(float, inner), plain.times[-1])
    scales = list(plain.scales)
    for step, value in enumerate(ends):
        scales[method.calls * (step + 1)] = float(np.exp(value))
    whole = _step_lengths(times, method.calls)
    return ScaleTime(
        times=times,
        time_rates=tuple(map(float, -whole * count / method.calls * np.exp(rates))),
        scales=tuple(scales),
        scale_rates=tuple(map(float, scale_rates)),
    )


def _step_lengths(times: tuple[float, ...], calls: int) -> np.ndarray:
    """Length of the step that each call belongs to."""
    ends = np.array(times[::calls])
    return np.repeat(ends[:-1] - ends[1:], calls)
