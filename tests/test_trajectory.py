"""The reference loop: solver rows against textbook methods, the scale ladder against its law."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fewstep.noise_schedule import Flow, Level, NoiseSchedule, TrigFlow, Vp, levels_of
from fewstep.recipe import Grid, SolverRow
from fewstep.recipe_plan import plan_steps
from fewstep.sampling import step_weights
from fewstep.solvers.flow_frame import flow_scale, level_at
from fewstep.solvers.scale_time import RK2, plain_scale_time, solver_grid
from fewstep.toy import GaussianMixture
from fewstep.trajectory import advance, plain_steps, sample_trajectory
from tests.tiny_pipelines import flow_recipe, vp_recipe

NOISE = np.random.default_rng(0).normal(size=(64, 3))
SCHEDULES = pytest.mark.parametrize(
    "schedule", [Flow(), Vp(), TrigFlow()], ids=lambda s: s.__class__.__name__
)
VARIANCE = 0.3


def gaussian(sample: np.ndarray, level: Level) -> np.ndarray:
    """E[x0 | x_t] of data N(0, VARIANCE): a linear ODE whose solution is known."""
    return level.alpha * VARIANCE / (level.alpha**2 * VARIANCE + level.sigma**2) * sample


def deviation(level: Level) -> float:
    """Samples of the ODE scale with the deviation of the noisy data."""
    return (level.alpha**2 * VARIANCE + level.sigma**2) ** 0.5


def grid_levels(schedule: NoiseSchedule, num_steps: int) -> tuple[Level, ...]:
    timesteps = schedule.uniform_timesteps(num_steps)
    return levels_of(schedule, timesteps, [*map(schedule.sigma_of_timestep, timesteps), 0.0])


def run_rows(rows: list[SolverRow], levels: tuple[Level, ...]) -> np.ndarray:
    """Rows through the real thing: a recipe's grid, planned and run."""
    grid = Grid(
        timesteps=tuple(level.timestep for level in levels[:-1]),
        sigmas=tuple(level.sigma for level in levels),
        solver=tuple(rows),
    )
    recipe = replace(flow_recipe("sd3"), grids=(grid,), default_steps=len(rows))
    return sample_trajectory(gaussian, NOISE, plan_steps(recipe))


@SCHEDULES
def test_euler_as_rows_is_the_plain_loop(schedule: NoiseSchedule) -> None:
    levels = grid_levels(schedule, 5)
    rows = []
    for now, following in zip(levels, levels[1:], strict=False):
        weights = step_weights(now, following, following)
        rows.append(SolverRow(sample=weights.sample, x0=weights.x0))
    plain = plain_steps(levels, schedule)
    as_rows = [
        replace(step, weights=replace(step.weights, sample=row.sample, x0=row.x0))
        for step, row in zip(plain, rows, strict=True)
    ]
    expected = sample_trajectory(gaussian, NOISE, plain)
    np.testing.assert_array_equal(sample_trajectory(gaussian, NOISE, as_rows), expected)


def test_the_first_row_of_a_solver_counts_though_no_call_is_before_it() -> None:
    levels = grid_levels(Flow(), 1)
    moved = run_rows([SolverRow(sample=0.25, x0=0.5)], levels)
    np.testing.assert_allclose(moved, 0.25 * NOISE + 0.5 * gaussian(NOISE, levels[0]))


def test_a_row_that_looks_back_is_the_plain_step_where_there_is_nothing_behind() -> None:
    """Image to image may begin at any row."""
    recipe = flow_recipe("sd3")
    row = SolverRow(sample=0.1, x0=0.2, previous_x0=0.3)
    rows = (SolverRow(sample=0.9, x0=0.1), *3 * (row,))
    grid = replace(recipe.grids[0], solver=rows)
    planned, plain = plan_steps(replace(recipe, grids=(grid,)))[1], plan_steps(recipe)[1]
    x0 = np.ones_like(NOISE)
    np.testing.assert_array_equal(
        advance(planned, NOISE, x0, None), advance(plain, NOISE, x0, None)
    )
    np.testing.assert_allclose(
        advance(planned, NOISE, x0, None, (NOISE, 2 * x0)), 0.1 * NOISE + 0.2 * x0 + 0.6 * x0
    )


def adams_bashforth_rows(levels: tuple[Level, ...]) -> list[SolverRow]:
    """x' = v: x + h (3/2 v_n - 1/2 v_{n-1}), v = (x - x0) / sigma, the first step Euler."""
    rows = []
    for i, (now, following) in enumerate(zip(levels, levels[1:], strict=False)):
        h = following.sigma - now.sigma
        if i == 0:
            rows.append(SolverRow(sample=1 + h / now.sigma, x0=-h / now.sigma))
            continue
        ratio = h / (now.sigma - levels[i - 1].sigma)
        a, b = h * (1 + ratio / 2), -h * ratio / 2
        before = levels[i - 1].sigma
        rows.append(
            SolverRow(
                sample=1 + a / now.sigma,
                x0=-a / now.sigma,
                previous_sample=b / before,
                previous_x0=-b / before,
            )
        )
    return rows


def hand_written_ab2(levels: tuple[Level, ...]) -> np.ndarray:
    sample, before, last = NOISE, None, 0.0
    for now, following in zip(levels, levels[1:], strict=False):
        h = following.sigma - now.sigma
        velocity = (sample - gaussian(sample, now)) / now.sigma
        slope = velocity if before is None else velocity + h / last / 2 * (velocity - before)
        sample, before, last = sample + h * slope, velocity, h
    return sample


def test_adams_bashforth_as_rows_is_the_textbook_method() -> None:
    levels = levels_of(Flow(), (1000.0, 700.0, 450.0, 100.0), (1.0, 0.7, 0.45, 0.1, 0.0))
    moved = run_rows(adams_bashforth_rows(levels), levels)
    np.testing.assert_allclose(moved, hand_written_ab2(levels), rtol=1e-12)


def test_adams_bashforth_rows_converge_with_order_two() -> None:
    def error(count: int) -> float:
        levels = grid_levels(Flow(), count)
        exact = NOISE * deviation(levels[-1]) / deviation(levels[0])
        return float(abs(run_rows(adams_bashforth_rows(levels), levels) - exact).max())

    assert np.log2(error(64) / error(128)) == pytest.approx(2.0, abs=0.15)


def midpoint(schedule: NoiseSchedule, count: int, denoise: Any) -> np.ndarray:
    times = tuple(float(t) for t in np.linspace(0.8, 0.0, count + 1))
    grid = solver_grid(plain_scale_time(times, RK2), RK2, schedule)
    recipe = flow_recipe("sd3") if isinstance(schedule, Flow) else vp_recipe("sd15")
    planned = plan_steps(replace(recipe, grids=(grid,), default_steps=2 * count))
    return sample_trajectory(denoise, NOISE, planned)


@pytest.mark.parametrize("schedule", [Flow(), Vp()], ids=["flow", "vp"])
def test_midpoint_rows_reach_the_exact_solution_of_a_linear_ode(schedule: NoiseSchedule) -> None:
    """Order two at least; on Gaussian data the leading error term happens to cancel."""
    exact = NOISE * VARIANCE**0.5 / deviation(level_at(schedule, 0.8))
    coarse, fine = (
        float(abs(midpoint(schedule, count, gaussian) - exact).max()) for count in (6, 12)
    )
    assert fine < 1e-3
    assert np.log2(coarse / fine) > 1.9


def test_midpoint_rows_converge_with_order_two() -> None:
    denoise = GaussianMixture(
        np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]), [0.3, 0.2], [0.4, 0.6]
    ).denoise
    best = midpoint(Flow(), 512, denoise)
    coarse, fine = (
        float(abs(midpoint(Flow(), count, denoise) - best).mean()) for count in (16, 32)
    )
    assert np.log2(coarse / fine) == pytest.approx(2.0, abs=0.1)


def test_midpoint_rows_are_the_textbook_method() -> None:
    """y_m = y + h/2 u(y, t), y' = y + h u(y_m, t_m), in the flow frame, on a VP schedule."""
    schedule, times = Vp(), (0.9, 0.5, 0.2, 0.0)
    grid = solver_grid(plain_scale_time(times, RK2), RK2, schedule)
    recipe = replace(vp_recipe("sd15"), grids=(grid,), default_steps=6)
    start = level_at(schedule, 0.9)
    moved = sample_trajectory(gaussian, NOISE, plan_steps(recipe))

    def velocity(y: np.ndarray, time: float) -> np.ndarray:
        level = level_at(schedule, time)
        return (y - gaussian(y * flow_scale(level), level)) / time

    y = NOISE / flow_scale(start)
    for now, following in zip(times, times[1:], strict=False):
        middle = y + (following - now) / 2 * velocity(y, now)
        y = y + (following - now) * velocity(middle, (now + following) / 2)
    np.testing.assert_allclose(moved, y, rtol=1e-9)


def test_the_scale_ladder_is_the_hand_written_loop() -> None:
    """Predict, enlarge, noise again at the new size; one draw per size of the result."""
    recipe = flow_recipe("sd3", stochasticity=1.0)
    grid = replace(recipe.grids[0], sizes=(0.25, 0.5, 0.5, 1.0))
    planned = plan_steps(replace(recipe, grids=(grid,)))
    assert [(s.size, s.following_size) for s in planned] == [
        (0.25, 0.5),
        (0.5, 0.5),
        (0.5, 1.0),
        (1.0, 1.0),
    ]
    drawn: list[tuple[int, ...]] = []

    def draws(seed: int) -> Any:
        generator = np.random.default_rng(seed)

        def draw(size: float) -> np.ndarray:
            drawn.append((2, round(8 * size), round(8 * size)))
            return generator.normal(size=drawn[-1])

        return draw

    def enlarge(x0: np.ndarray, size: float) -> np.ndarray:
        factor = round(8 * size) // x0.shape[-1]
        return x0.repeat(factor, axis=-1).repeat(factor, axis=-2)

    def network(sample: np.ndarray, level: Level) -> np.ndarray:
        return np.tanh(sample) * (1 + level.timestep / 1000)

    draw = draws(0)
    ours = sample_trajectory(network, draw(0.25), planned, draw=draw, resize=enlarge)
    assert drawn == [(2, 2, 2), (2, 4, 4), (2, 4, 4), (2, 8, 8)]

    levels, draw = recipe.levels(), draws(0)
    sample = draw(0.25)
    for i, size in enumerate((0.5, 0.5, 1.0)):
        x0 = network(sample, levels[i])
        if x0.shape[-1] != 8 * size:
            x0 = enlarge(x0, size)
        sample = levels[i + 1].alpha * x0 + levels[i + 1].sigma * draw(size)
    np.testing.assert_allclose(ours, network(sample, levels[3]), rtol=1e-12)


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_a_perfect_student_on_a_ladder_draws_the_data_at_every_size(kind: str) -> None:
    """Data: one value per picture in all its pixels; their mean sees it through less noise.

    A perfect student of pictures of n equal pixels N(m, v): posterior draws. After re-noising at
    each size the samples' mean and variance are alpha m and alpha^2 v + sigma^2 / n.
    """
    make = flow_recipe if kind == "flow" else vp_recipe
    recipe = make("sd3", stochasticity=1.0)
    grid = replace(recipe.grids[0], sizes=(0.25, 0.5, 0.75, 1.0))
    planned = plan_steps(replace(recipe, grids=(grid,)))
    mean, variance, count = 1.5, 0.4, 40_000
    generator = np.random.default_rng(1)
    pixels: list[int] = []
    seen: list[tuple[float, float]] = []

    def student(sample: np.ndarray, level: Level) -> np.ndarray:
        num = sample.shape[1]
        pixels.append(num)
        average = sample.mean(axis=1, keepdims=True)
        seen.append((float(average.mean()), float(average.var())))
        noise = level.sigma**2 / num
        gain = level.alpha * variance / (level.alpha**2 * variance + noise)
        centre = mean + gain * (average - level.alpha * mean)
        left = (variance * (1 - gain * level.alpha)) ** 0.5
        draw = centre + left * generator.normal(size=average.shape)
        return np.repeat(draw, num, axis=1)

    def draw(size: float) -> np.ndarray:
        return generator.normal(size=(count, round(4 * size)))

    first = planned[0].level
    data = mean + variance**0.5 * generator.normal(size=(count, 1))
    start = first.alpha * data + first.sigma * draw(0.25)
    end = sample_trajectory(
        student,
        start,
        planned,
        draw=draw,
        resize=lambda x0, size: np.repeat(x0[:, :1], round(4 * size), axis=1),
    )
    assert pixels == [1, 2, 3, 4]
    for (average, spread), step, num in zip(seen, planned, pixels, strict=True):
        expected = step.level.alpha**2 * variance + step.level.sigma**2 / num
        assert average == pytest.approx(step.level.alpha * mean, abs=0.03)
        assert spread == pytest.approx(expected, rel=0.04)
    assert float(end.mean()) == pytest.approx(mean, abs=0.02)
    assert float(end[:, 0].var()) == pytest.approx(variance, rel=0.04)
