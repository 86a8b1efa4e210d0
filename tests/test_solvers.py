"""Searches and fits on the boundary: closed forms, brute force, and what they may never do."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, TrigFlow, Vp
from fewstep.recipe import SolverRow
from fewstep.solvers.bespoke import fit_bespoke, run_solver
from fewstep.solvers.d_ode import data_direction, fit_d_ode, noise_direction
from fewstep.solvers.flow_frame import (
    even_levels,
    flow_scale,
    flow_time,
    grid_of,
    level_at,
    refined_levels,
)
from fewstep.solvers.least_squares import fit_least_squares
from fewstep.solvers.optimal_steps import count_calls, even_indices, optimal_grids
from fewstep.solvers.scale_time import RK1, RK2, Method, ScaleTime, plain_scale_time, solver_grid
from fewstep.solvers.teacher_path import euler_step, mean_square, teacher_states
from fewstep.toy import GaussianMixture

VARIANCE = 0.2
MIXTURE = GaussianMixture(
    np.random.default_rng(1).normal(size=(5, 2)) * 1.5, [0.05] * 5, [0.1, 0.3, 0.2, 0.25, 0.15]
)
BOTH = pytest.mark.parametrize("schedule", [Flow(3.0), Vp()], ids=["flow", "vp"])
METHODS = pytest.mark.parametrize("method", [RK1, RK2], ids=lambda method: method.name)


def gaussian(sample: Any, level: Level) -> Any:
    """E[x0 | x_t] of N(0, VARIANCE): every Euler step multiplies by a number."""
    return sample * (level.alpha * VARIANCE / (level.alpha**2 * VARIANCE + level.sigma**2))


def noise(count: int, schedule: NoiseSchedule, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, 2))
    return values * even_levels(schedule, 1)[0].sigma


def euler_end(denoise: Any, sample: Any, levels: Any) -> Any:
    return teacher_states(denoise, sample, levels)[-1]


# --- the flow frame ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Flow(), Vp(), TrigFlow()])
def test_every_schedule_is_a_straight_path_in_the_frame(schedule: NoiseSchedule) -> None:
    for time in (0.9, 0.5, 0.1):
        level = level_at(schedule, time)
        assert flow_time(level) == pytest.approx(time, abs=1e-12)
        assert level.alpha / flow_scale(level) == pytest.approx(1.0 - time, abs=1e-12)
        assert schedule.sigma_of_timestep(level.timestep) == pytest.approx(level.sigma, abs=1e-9)


@BOTH
def test_a_plain_step_is_euler_in_the_frame(schedule: NoiseSchedule) -> None:
    """DDIM included: x0 and epsilon held fixed is a straight line there."""
    sample, x0 = noise(4, schedule), noise(4, schedule, seed=1)
    now, following = level_at(schedule, 0.8), level_at(schedule, 0.3)
    moved = euler_step(sample, x0, now, following) / flow_scale(following)
    y = sample / flow_scale(now)
    np.testing.assert_allclose(moved, y + (0.3 - 0.8) * (y - x0) / 0.8, rtol=1e-12)


def test_refining_keeps_the_levels() -> None:
    levels = even_levels(Vp(), 3)
    fine = refined_levels(Vp(), levels, 4)
    assert len(fine) == 13
    assert fine[::4] == levels
    assert all(a.sigma > b.sigma for a, b in itertools.pairwise(fine))


# --- optimal steps ----------------------------------------------------------------------------


def brute_force(
    denoise: Any, sample: Any, levels: Any, count: int
) -> tuple[tuple[int, ...], float]:
    """Every choice of exactly `count` steps, by the end's distance to the teacher's."""
    num = len(levels) - 1
    target = euler_end(denoise, sample, levels)
    best: tuple[tuple[int, ...], float] = ((), float("inf"))
    for inner in itertools.combinations(range(1, num), count - 1):
        indices = (0, *inner, num)
        end = euler_end(denoise, sample, [levels[i] for i in indices])
        error = mean_square(end, target)
        if error < best[1]:
            best = (indices, error)
    return best


@BOTH
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_on_gaussian_data_the_search_is_brute_force(schedule: NoiseSchedule, count: int) -> None:
    """Where it is exact: a step multiplies by a number, and every error has one sign.

    The deviation of noisy Gaussian data is convex in the frame's time, so Euler always falls
    short, the best prefix is the longest one, and one state per level loses nothing.
    """
    levels, sample = even_levels(schedule, 14), noise(8, schedule)
    found = optimal_grids(gaussian, sample, levels, [count])[count]
    indices, error = brute_force(gaussian, sample, levels, count)
    assert found.indices == indices
    assert found.error == pytest.approx(error, rel=1e-9)
    assert len(found.levels) == count + 1


@BOTH
def test_on_a_mixture_the_search_is_near_brute_force(schedule: NoiseSchedule) -> None:
    levels, sample = even_levels(schedule, 12), noise(64, schedule)
    found = optimal_grids(MIXTURE.denoise, sample, levels, [3])[3]
    _, best = brute_force(MIXTURE.denoise, sample, levels, 3)
    assert best - 1e-12 <= found.error <= 1.25 * best


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_a_found_grid_is_never_worse_than_the_even_one(schedule: NoiseSchedule, seed: int) -> None:
    levels, sample = even_levels(schedule, 24), noise(16, schedule, seed)
    found = optimal_grids(MIXTURE.denoise, sample, levels, [2, 3, 4, 6, 8])
    target = euler_end(MIXTURE.denoise, sample, levels)
    for count, grid in found.items():
        even = [levels[i] for i in even_indices(24, count)]
        even_error = mean_square(euler_end(MIXTURE.denoise, sample, even), target)
        assert grid.even_error == pytest.approx(even_error, rel=1e-9)
        assert grid.error <= grid.even_error
        assert grid.error == pytest.approx(
            mean_square(euler_end(MIXTURE.denoise, sample, grid.levels), target), rel=1e-9
        )


def test_the_even_choice_is_kept_where_the_search_misses_it() -> None:
    """One state per level may lose the best path: here the search alone ends five times worse."""
    generator = np.random.default_rng(39)
    mixture = GaussianMixture(generator.normal(size=(3, 2)) * 2, [0.02] * 3, [1 / 3] * 3)
    levels, sample = even_levels(Flow(), 6), noise(1, Flow(), 39)
    target = euler_end(mixture.denoise, sample, levels)
    missed = euler_end(mixture.denoise, sample, [levels[i] for i in (0, 3, 4, 6)])
    found = optimal_grids(mixture.denoise, sample, levels, [3])[3]
    assert found.indices == (0, 2, 4, 6) == even_indices(6, 3)
    assert found.error == found.even_error < 0.25 * mean_square(missed, target)


def test_one_cost_counts_for_the_whole_batch() -> None:
    """Pictures that would want other grids alone get the one that serves them together."""
    levels = even_levels(Flow(), 16)
    samples = [noise(1, Flow(), seed) for seed in range(6)]
    alone = {optimal_grids(MIXTURE.denoise, s, levels, [2])[2].indices for s in samples}
    assert len(alone) > 1
    together = np.concatenate(samples)
    found = optimal_grids(MIXTURE.denoise, together, levels, [2])[2]
    assert found.indices == brute_force(MIXTURE.denoise, together, levels, 2)[0]


def test_numpy_and_torch_find_the_same_grid_and_twice_the_same() -> None:
    levels, sample = even_levels(Vp(), 20), noise(16, Vp())
    mixture = GaussianMixture(torch.as_tensor(MIXTURE.means), MIXTURE.variances, MIXTURE.weights)
    ours = optimal_grids(MIXTURE.denoise, sample, levels, [4])[4]
    theirs = optimal_grids(mixture.denoise, torch.as_tensor(sample), levels, [4])[4]
    assert ours.indices == theirs.indices
    assert optimal_grids(MIXTURE.denoise, sample, levels, [4])[4] == ours


def test_the_calls_are_counted_right() -> None:
    calls = 0

    def counted(sample: Any, level: Level) -> Any:
        nonlocal calls
        calls += 1
        return gaussian(sample, level)

    optimal_grids(counted, noise(2, Flow()), even_levels(Flow(), 12), [2, 4])
    assert calls == count_calls(12, [2, 4])


@pytest.mark.parametrize("counts", [[], [0], [13]])
def test_step_counts_beyond_the_teacher_are_refused(counts: list[int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 to the teacher's 12"):
        optimal_grids(gaussian, noise(2, Flow()), even_levels(Flow(), 12), counts)


# --- D-ODE ------------------------------------------------------------------------------------


def test_the_lambda_of_a_linear_ode_is_its_closed_form() -> None:
    """Flow, sigma 1 -> 0.5 -> 0, N(0, v): x0_1 = 0, x_1 = x/2, x0_2 = g x/2, g = 2v/(1+v).

    The exact end is sqrt(v) x, so lambda_2 = (sqrt(v) - g/2) / (g/2 - 0).
    """
    levels, sample = even_levels(Flow(), 2), noise(16, Flow())
    exact = [sample, sample * ((1 + VARIANCE) / 4) ** 0.5, sample * VARIANCE**0.5]
    fit = fit_d_ode(gaussian, sample, levels, exact)
    half = VARIANCE / (1 + VARIANCE)
    assert fit.lambdas == pytest.approx((0.0, (VARIANCE**0.5 - half) / half))
    assert fit.error == pytest.approx(0.0, abs=1e-24)
    assert fit.plain_error == pytest.approx(float(((half - VARIANCE**0.5) ** 2 * sample**2).mean()))
    assert fit.rows[0] == SolverRow(sample=0.5, x0=0.5)
    assert fit.rows[1].x0 == pytest.approx(1.0 + fit.lambdas[1])
    assert fit.rows[1].previous_x0 == pytest.approx(-fit.lambdas[1])


@BOTH
@pytest.mark.parametrize("direction", [data_direction, noise_direction])
def test_on_a_linear_ode_every_grid_point_is_reached(
    schedule: NoiseSchedule, direction: Any
) -> None:
    """One number per step suffices where the solution is one number: all but the first, plain."""
    levels = tuple(level_at(schedule, t) for t in (0.9, 0.6, 0.35, 0.1, 0.0))
    sample = noise(8, schedule)
    targets = teacher_states(gaussian, sample, refined_levels(schedule, levels, 16))[::16]
    fit = fit_d_ode(gaussian, sample, levels, targets, direction)
    assert fit.error < 1e-20 < fit.plain_error
    end = run_solver(gaussian, sample, schedule, grid_of(levels, fit.rows))
    np.testing.assert_allclose(end, targets[-1], rtol=1e-9)


@BOTH
@pytest.mark.parametrize("direction", [data_direction, noise_direction])
def test_each_lambda_is_the_least_squares_optimum(schedule: NoiseSchedule, direction: Any) -> None:
    """Moving the last lambda either way makes the end worse; rows and fit agree."""
    levels = tuple(level_at(schedule, t) for t in (0.93, 0.6, 0.3, 0.0))
    sample = noise(128, schedule)
    targets = teacher_states(MIXTURE.denoise, sample, refined_levels(schedule, levels, 12))[::12]
    fit = fit_d_ode(MIXTURE.denoise, sample, levels, targets, direction)
    assert fit.error < fit.plain_error
    unit = direction(levels[1], levels[2], levels[3])

    def error(shift: float) -> float:
        row = fit.rows[2]
        moved = SolverRow(
            sample=row.sample + shift * unit.sample,
            x0=row.x0 + shift * unit.x0,
            previous_sample=row.previous_sample + shift * unit.previous_sample,
            previous_x0=row.previous_x0 + shift * unit.previous_x0,
        )
        grid = grid_of(levels, (*fit.rows[:2], moved))
        return mean_square(run_solver(MIXTURE.denoise, sample, schedule, grid), targets[-1])

    assert error(0.0) == pytest.approx(fit.error, rel=1e-9)
    assert error(0.01) > error(0.0) < error(-0.01)


def test_noise_cannot_be_extrapolated_from_a_level_without_signal() -> None:
    levels = even_levels(Flow(), 2)
    with pytest.raises(ConfigError, match="alpha 0; use clean data"):
        fit_d_ode(gaussian, noise(2, Flow()), levels, [noise(2, Flow())] * 3, noise_direction)


def test_targets_must_fit_the_levels() -> None:
    with pytest.raises(ConfigError, match="got 1 targets for 3 levels"):
        fit_d_ode(gaussian, noise(2, Flow()), even_levels(Flow(), 2), [noise(2, Flow())])


# --- Bespoke ----------------------------------------------------------------------------------


@BOTH
def test_identity_parameters_of_rk1_are_plain_steps(schedule: NoiseSchedule) -> None:
    levels = even_levels(schedule, 5)
    plain = plain_scale_time(tuple(flow_time(level) for level in levels), RK1)
    end = run_solver(
        MIXTURE.denoise, noise(8, schedule), schedule, solver_grid(plain, RK1, schedule)
    )
    expected = euler_end(MIXTURE.denoise, noise(8, schedule), levels)
    np.testing.assert_allclose(end, expected, rtol=1e-7, atol=1e-9)


def random_solver(method: Method, num_steps: int, first: float) -> ScaleTime:
    generator = np.random.default_rng(7)
    count = num_steps * method.calls
    times = np.sort(generator.uniform(0.1, first, size=count - 1))[::-1]
    return ScaleTime(
        (first, *map(float, times), 0.0),
        tuple(map(float, -generator.uniform(0.3, 1.5, size=count))),
        (1.0, *map(float, generator.uniform(0.5, 2.0, size=count))),
        tuple(map(float, generator.uniform(-0.5, 0.5, size=count))),
    )


def by_the_formula(
    solver: ScaleTime, method: Method, sample: np.ndarray, schedule: NoiseSchedule
) -> np.ndarray:
    """sbar = s y; Runge-Kutta on sbar' = (s'/s) sbar + t' s u(sbar/s, t), on the unit interval."""
    points = len(solver.time_rates)
    h = method.calls / points

    def slope(bar: np.ndarray, i: int) -> np.ndarray:
        level = level_at(schedule, solver.times[i])
        y = bar / solver.scales[i]
        x0 = MIXTURE.denoise(y * flow_scale(level), level)
        velocity = (y - x0) / solver.times[i]
        stretch = solver.scale_rates[i] / solver.scales[i]
        return stretch * bar + solver.time_rates[i] * solver.scales[i] * velocity

    bar = sample / flow_scale(level_at(schedule, solver.times[0]))
    for i in range(0, points, method.calls):
        if method.calls == 1:
            bar = bar + h * slope(bar, i)
        else:
            bar = bar + h * slope(bar + h / 2 * slope(bar, i), i + 1)
    return bar / solver.scales[-1]


@BOTH
@METHODS
def test_rows_are_the_scale_time_formula(schedule: NoiseSchedule, method: Method) -> None:
    solver = random_solver(method, 3, 0.93)
    sample = noise(16, schedule)
    grid = solver_grid(solver, method, schedule)
    assert len(grid.solver) == 3 * method.calls
    ours = run_solver(MIXTURE.denoise, sample, schedule, grid)
    np.testing.assert_allclose(
        ours, by_the_formula(solver, method, sample, schedule), rtol=1e-6, atol=1e-8
    )


@BOTH
@METHODS
def test_a_fit_improves_and_holds_for_other_noise(schedule: NoiseSchedule, method: Method) -> None:
    sample, other = noise(96, schedule), noise(96, schedule, seed=5)
    fine = even_levels(schedule, 64)
    target = euler_end(MIXTURE.denoise, sample, fine)
    levels = even_levels(schedule, 4 // method.calls)
    fit = fit_bespoke(MIXTURE.denoise, sample, schedule, levels, target, method)
    assert fit.error < 0.2 * fit.plain_error
    assert fit.grid.num_steps == 4
    held = run_solver(MIXTURE.denoise, other, schedule, fit.grid)
    plain = solver_grid(
        plain_scale_time(tuple(flow_time(level) for level in levels), method), method, schedule
    )
    expected = euler_end(MIXTURE.denoise, other, fine)
    before = mean_square(run_solver(MIXTURE.denoise, other, schedule, plain), expected)
    assert mean_square(held, expected) < 0.4 * before


def test_a_vp_fit_calls_nothing_between_the_first_timestep_and_clean_data() -> None:
    """A target that wants the last call at clean data: the grid stays one a recipe can hold."""
    sample = noise(32, Vp())
    fit = fit_bespoke(gaussian, sample, Vp(), even_levels(Vp(), 2), sample * VARIANCE**0.5, RK2)
    assert min(fit.grid.timesteps) >= 0.0
    assert min(fit.grid.sigmas[:-1]) >= Vp().sigma_of_timestep(0.0) - 1e-9


def test_fits_repeat_and_work_on_torch() -> None:
    sample = noise(32, Flow())
    target = euler_end(gaussian, sample, even_levels(Flow(), 48))
    levels = even_levels(Flow(), 2)
    first = fit_bespoke(gaussian, sample, Flow(), levels, target, RK1, num_rounds=3)
    again = fit_bespoke(gaussian, sample, Flow(), levels, target, RK1, num_rounds=3)
    tensors = [torch.as_tensor(part) for part in (sample, target)]
    in_torch = fit_bespoke(gaussian, tensors[0], Flow(), levels, tensors[1], RK1, num_rounds=3)
    assert first == again
    assert in_torch.error == pytest.approx(first.error, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (((0.9, 0.5, 0.6), (-1.0, -1.0), (1.0,) * 3, (0.0,) * 2), "times that fall to 0"),
        (((0.9, 0.5, 0.0), (-1.0, -1.0), (1.0, -1.0, 1.0), (0.0,) * 2), "scales above 0"),
        (((0.9, 0.5, 0.0), (-1.0,), (1.0,) * 3, (0.0,) * 2), "as many rates"),
    ],
)
def test_impossible_solvers_are_refused(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ScaleTime(*values)


def test_a_midpoint_solver_needs_whole_steps() -> None:
    with pytest.raises(ConfigError, match="two calls a step"):
        solver_grid(random_solver(RK1, 3, 0.9), RK2, Flow())


# --- least squares ----------------------------------------------------------------------------


def test_least_squares_finds_the_minimum_of_a_curved_valley() -> None:
    """Rosenbrock's function as residuals; its minimum is (1, 1)."""

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.array([10.0 * (p[1] - p[0] ** 2), 1.0 - p[0]])

    fitted = fit_least_squares(residuals, np.array([-0.5, 0.5]), num_rounds=60)
    np.testing.assert_allclose(fitted.values, [1.0, 1.0], atol=2e-2)


def test_least_squares_never_ends_above_its_start() -> None:
    """Residuals that are not numbers beyond a wall, as a solver that blew up."""

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.array([np.nan]) if p[0] > 0.4 else np.array([2.0 - p[0]])

    fitted = fit_least_squares(residuals, np.array([0.0]), num_rounds=5)
    assert fitted.cost <= 4.0
    assert np.isfinite(fitted.values).all()
