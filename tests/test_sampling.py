"""fewstep/sampling.py: the one step is diffusers' step, keeps marginals, and converges."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_scm import SCMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler

from fewstep.errors import ConfigError
from fewstep.noise_schedule import CLEAN, Flow, Level, NoiseSchedule, TrigFlow, Vp, levels_of
from fewstep.sampling import (
    Prediction,
    add_noise,
    from_x0,
    step,
    step_weights,
    to_x0,
)
from fewstep.toy import GaussianMixture
from fewstep.trajectory import plain_steps, sample_trajectory

SHAPE = (2, 4, 8, 8)
SD_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
VP_GRID = (999.0, 749.0, 499.0, 249.0)
ALL_SCHEDULES = [Vp(), Vp(0.0001, 0.02, "linear"), Flow(3.0), TrigFlow()]


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Any smooth function of sample and time will do as a network's raw output."""
    return torch.tanh(sample) * (0.5 + timestep / 2000) + 0.1 * torch.roll(sample, 1, -1)


def draws(seed: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def our_run(
    prediction: Prediction,
    schedule: NoiseSchedule,
    levels: tuple[Level, ...],
    stochasticity: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The whole trajectory from seed 0, by the reference loop."""
    draw = draws(0)

    def denoise(sample: torch.Tensor, level: Level) -> torch.Tensor:
        return to_x0(prediction, network(sample, level.timestep), sample, level)

    steps = plain_steps(levels, schedule, stochasticity)
    return sample_trajectory(denoise, draw().to(dtype), steps, draw=lambda _: draw().to(dtype))


def diffusers_run(scheduler: Any, timesteps: torch.Tensor, **options: Any) -> torch.Tensor:
    """The same trajectory by a diffusers scheduler, noise from the same stream."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    for timestep in timesteps:
        output = network(sample, float(timestep))
        sample = scheduler.step(output, timestep, sample, **options, return_dict=False)[0]
    return sample


def vp_levels(grid: tuple[float, ...], terminal: float = 0.0) -> tuple[Level, ...]:
    return levels_of(Vp(), grid, [*(Vp().sigma_of_timestep(t) for t in grid), terminal])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, rtol: float = 2e-5) -> None:
    """Largest difference relative to the largest value: theirs has float32 tables of alphas."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < rtol


# --- one step function, five diffusers schedulers --------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "name"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_stochasticity_0_is_ddim(prediction: Prediction, name: Any) -> None:
    ddim = DDIMScheduler(
        **SD_BETAS,
        timestep_spacing="trailing",
        prediction_type=name,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    ddim.set_timesteps(4)
    theirs = diffusers_run(ddim, ddim.timesteps, eta=0.0)
    assert_close(our_run(prediction, Vp(), vp_levels(VP_GRID), 0.0), theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers hands numpy tensors
def test_stochasticity_0_is_euler_discrete() -> None:
    """Euler in Karras sigmas s = sigma / alpha is DDIM in another coordinate, x / hypot(1, s)."""
    euler = EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing")
    euler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    start = float(np.hypot(float(euler.sigmas[0]), 1.0))
    sample = torch.randn(SHAPE, generator=generator) * start
    for timestep in euler.timesteps:
        output = network(euler.scale_model_input(sample, timestep), float(timestep))
        sample = euler.step(output, timestep, sample, return_dict=False)[0]
    assert_close(our_run("epsilon", Vp(), vp_levels(VP_GRID), 0.0), sample)


@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("grid", [VP_GRID, (999.0, 759.0, 499.0, 259.0), (399.0,)])
def test_stochasticity_1_is_lcm(prediction: Prediction, name: Any, grid: tuple[float, ...]) -> None:
    # timestep_scaling switches off the boundary scalings, which DMD2's networks do not have
    lcm = LCMScheduler(
        **SD_BETAS, prediction_type=name, timestep_scaling=1e6, original_inference_steps=1000
    )
    lcm.set_timesteps(timesteps=[int(t) for t in grid])
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    theirs = diffusers_run(lcm, lcm.timesteps, generator=generator)
    assert_close(our_run(prediction, Vp(), vp_levels(grid), 1.0), theirs)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("num_steps", [2, 4, 8])
@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_between_is_tcd_with_its_own_terminal(
    prediction: Prediction, name: Any, num_steps: int, gamma: float
) -> None:
    tcd = TCDScheduler(**SD_BETAS, prediction_type=name)
    tcd.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    theirs = diffusers_run(tcd, tcd.timesteps, eta=gamma, generator=generator)
    levels = vp_levels(tuple(map(float, tcd.timesteps)), Vp().sigma_of_timestep(0.0))
    assert_close(our_run(prediction, Vp(), levels, gamma), theirs)


def test_tcd_gamma_1_is_not_lcm_because_it_stops_at_timestep_0() -> None:
    """A known, small difference: theirs keeps 3 % of the predicted epsilon at every step."""
    tcd = TCDScheduler(**SD_BETAS)
    tcd.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    theirs = diffusers_run(tcd, tcd.timesteps, eta=1.0, generator=generator)
    levels = vp_levels(tuple(map(float, tcd.timesteps)), Vp().sigma_of_timestep(0.0))
    ours = our_run("epsilon", Vp(), levels, 1.0)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert 1e-3 < difference < 0.3
    # with TCD's own stop the two agree again
    draw = draws(0)
    sample = draw()
    for now, following in itertools.pairwise(levels):
        x0 = to_x0("epsilon", network(sample, now.timestep), sample, now)
        via = Vp().level(0.0)
        noise = draw() if following is not levels[-1] else None
        sample = step(sample, x0, now, following, noise, following if noise is None else via)
    assert_close(sample, theirs)


@pytest.mark.parametrize("is_stochastic", [False, True])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_flow_is_flow_match_euler(shift: float, is_stochastic: bool) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=is_stochastic)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    timesteps: Any = theirs.timesteps
    expected = diffusers_run(theirs, timesteps, generator=generator)
    schedule = Flow(shift)
    grid = schedule.uniform_timesteps(4)
    levels = levels_of(schedule, grid, [*(t / 1000 for t in grid), 0.0])
    assert_close(our_run("flow", schedule, levels, float(is_stochastic)), expected)


def test_trigflow_is_scm() -> None:
    """Theirs scales data and noise by sigma_data at the pipeline's edge; 1 leaves them alone."""
    scm = SCMScheduler(sigma_data=1.0)
    scm.set_timesteps(2, max_timesteps=1.5708, intermediate_timesteps=1.3)
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    theirs = diffusers_run(scm, scm.timesteps[:-1], generator=generator)
    levels = levels_of(TrigFlow(), [1.5708, 1.3], [math.sin(1.5708), math.sin(1.3), 0.0])
    assert_close(our_run("trigflow", TrigFlow(), levels, 1.0), theirs)


# --- numpy and torch are one code path --------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
def test_numpy_and_torch_agree(schedule: NoiseSchedule, stochasticity: float) -> None:
    generator = np.random.default_rng(0)
    sample, x0, noise = generator.standard_normal((3, 64))
    levels = [schedule.level(t) for t in schedule.uniform_timesteps(4)]
    for now, following in itertools.pairwise([*levels, CLEAN]):
        via = schedule.via(following, stochasticity)
        exact = step(sample, x0, now, following, noise, via)
        assert exact.dtype == np.float64
        for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            parts = [torch.from_numpy(part).to(dtype) for part in (sample, x0, noise)]
            result = step(parts[0], parts[1], now, following, parts[2], via)
            assert result.dtype == dtype
            np.testing.assert_allclose(result.numpy(), exact, rtol=rtol, atol=5 * rtol)
        single = [part.astype(np.float32) for part in (sample, x0, noise)]
        assert step(single[0], single[1], now, following, single[2], via).dtype == np.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x0", "trigflow"])
@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_float32_trajectory_stays_near_the_float64_one(
    schedule: NoiseSchedule, prediction: Prediction
) -> None:
    grid = [0.9 * t for t in schedule.uniform_timesteps(4)]
    levels = levels_of(schedule, grid, [*(schedule.sigma_of_timestep(t) for t in grid), 0.0])
    exact = our_run(prediction, schedule, levels, 0.5, torch.float64)
    single = our_run(prediction, schedule, levels, 0.5)
    assert exact.dtype == torch.float64
    assert_close(single, exact.float(), rtol=1e-5)


# --- predictions ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x0", "trigflow"])
def test_prediction_to_x0_and_back(schedule: NoiseSchedule, prediction: Prediction) -> None:
    sample, output = np.random.default_rng(1).standard_normal((2, 100))
    for part in (0.05, 0.5, 0.95):
        level = schedule.level(part * schedule.uniform_timesteps(1)[0])
        x0 = to_x0(prediction, output, sample, level)
        np.testing.assert_allclose(from_x0(prediction, x0, sample, level), output, atol=1e-11)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_a_perfect_network_gives_the_data_it_was_noised_from(schedule: NoiseSchedule) -> None:
    """The definitions of epsilon, v, velocity and TrigFlow's F, each where it belongs."""
    x0, epsilon = np.random.default_rng(2).standard_normal((2, 100))
    level = schedule.level(0.6 * schedule.uniform_timesteps(1)[0])
    sample = add_noise(x0, epsilon, level)
    perfect: dict[Prediction, np.ndarray] = {"epsilon": epsilon, "x0": x0}
    if isinstance(schedule, Flow):
        perfect["flow"] = epsilon - x0
    else:
        perfect["v"] = level.alpha * epsilon - level.sigma * x0
        perfect["trigflow"] = perfect["v"]
    for prediction, output in perfect.items():
        np.testing.assert_allclose(to_x0(prediction, output, sample, level), x0, atol=1e-12)
        np.testing.assert_allclose(from_x0(prediction, x0, sample, level), output, atol=1e-12)


def test_an_unknown_prediction_is_named() -> None:
    unknown: Any = "score"
    for convert in (to_x0, from_x0):
        with pytest.raises(ConfigError, match="prediction 'score' is unknown; use epsilon, v"):
            convert(unknown, np.ones(1), np.ones(1), Level(1.0, 0.6, 0.8))


# --- what a step keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_a_step_from_the_true_x0_lands_on_the_next_level(
    schedule: NoiseSchedule, stochasticity: float
) -> None:
    """With exact x0, the result has signal alpha and total noise sigma: the marginal is kept."""
    levels = [schedule.level(t) for t in schedule.uniform_timesteps(5)]
    for now, following in itertools.pairwise([*levels, CLEAN]):
        weights = step_weights(now, following, schedule.via(following, stochasticity))
        assert weights.sample * now.alpha + weights.x0 == pytest.approx(following.alpha, abs=1e-12)
        noise = math.hypot(weights.sample * now.sigma, weights.noise)
        assert noise == pytest.approx(following.sigma, abs=1e-9)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
def test_mean_and_variance_of_gaussian_data_follow_the_closed_form(
    schedule: NoiseSchedule, stochasticity: float
) -> None:
    """A linear network's step moves (mean, variance) by its weights; noise adds its own."""
    mean, variance = 1.5, 0.25
    levels = [schedule.level(t) for t in schedule.uniform_timesteps(4)]
    data = np.random.default_rng(3).normal(mean, math.sqrt(variance), 400_000)
    noise = np.random.default_rng(4).standard_normal((2, 400_000))
    now, following = levels[1], levels[2]
    via = schedule.via(following, stochasticity)
    moved = step(add_noise(data, noise[0], now), data, now, following, noise[1], via)
    assert moved.mean() == pytest.approx(following.alpha * mean, abs=0.01)
    assert moved.var() == pytest.approx(
        following.alpha**2 * variance + following.sigma**2, rel=0.01
    )


def test_the_end_is_exactly_x0() -> None:
    x0 = np.array([0.1, -0.7])
    for stochasticity in (0.0, 0.3, 1.0):
        via = Flow().via(CLEAN, stochasticity)
        for end in (via, Flow().level(100.0)):
            assert step_weights(Flow().level(625.0), CLEAN, end).noise == 0.0
        result = step(np.ones(2), x0, Flow().level(625.0), CLEAN, None, via)
        np.testing.assert_array_equal(result, x0)


def test_a_step_draws_exactly_when_it_says_so() -> None:
    for schedule in ALL_SCHEDULES:
        levels = [schedule.level(t) for t in schedule.uniform_timesteps(4)]
        for stochasticity, expected in ((0.0, 0), (0.3, 3), (1.0, 3)):
            drawn: list[int] = []

            def draw(_: float, drawn: list[int] = drawn) -> np.ndarray:
                drawn.append(1)
                return np.zeros(2)

            steps = plain_steps([*levels, CLEAN], schedule, stochasticity)
            sample_trajectory(lambda sample, level: sample, np.ones(2), steps, draw=draw)
            assert len(drawn) == expected


def test_a_step_without_its_noise_is_an_error() -> None:
    now, following = Flow().level(1000.0), Flow().level(500.0)
    with pytest.raises(ConfigError, match="adds fresh noise; pass noise of the sample's shape"):
        step(np.ones(2), np.ones(2), now, following, None, CLEAN)
    step(np.ones(2), np.ones(2), now, following, None, following)  # deterministic: none wanted


def test_a_step_cannot_start_at_clean_data() -> None:
    with pytest.raises(ConfigError, match=r"cannot start at clean data \(sigma 0\)"):
        step_weights(CLEAN, Flow().level(500.0), CLEAN)


# --- convergence ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Vp(), Flow(), TrigFlow()])
def test_halving_the_step_halves_the_error_on_gaussian_data(schedule: NoiseSchedule) -> None:
    """First order, as Euler is; the exact flow of N(m, v) keeps (x - alpha m) / deviation."""
    mean, variance = 1.5, 0.25
    teacher = GaussianMixture(np.array([[mean]]), [variance], [1.0])
    start = schedule.level(0.95 * schedule.uniform_timesteps(1)[0])
    end = schedule.level(0.05 * schedule.uniform_timesteps(1)[0])

    def deviation(level: Level) -> float:
        return math.sqrt(level.alpha**2 * variance + level.sigma**2)

    sample = start.alpha * mean + deviation(start) * np.linspace(-2, 2, 9)[:, None]
    exact = end.alpha * mean + deviation(end) * np.linspace(-2, 2, 9)[:, None]
    errors = []
    for num_steps in (20, 40, 80, 160):
        timesteps = np.linspace(start.timestep, end.timestep, num_steps + 1)
        levels = [schedule.level(float(t)) for t in timesteps]
        result = sample_trajectory(teacher.denoise, sample, plain_steps(levels, schedule))
        errors.append(float(np.abs(result - exact).max()))
    ratios = [first / second for first, second in itertools.pairwise(errors)]
    assert ratios[-1] == pytest.approx(2.0, abs=0.1)
    assert all(1.7 < ratio < 2.4 for ratio in ratios)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_renoising_a_perfect_student_gives_the_data_in_any_number_of_steps(
    schedule: NoiseSchedule, num_steps: int
) -> None:
    """A student that jumps to the end of the exact flow of N(m, v): m, v, whatever the grid."""
    mean, deviation = 1.5, 0.5

    def student(sample: np.ndarray, level: Level) -> np.ndarray:
        spread = math.hypot(level.alpha * deviation, level.sigma)
        return mean + deviation * (sample - level.alpha * mean) / spread

    generator = np.random.default_rng(6)
    levels = [*(schedule.level(t) for t in schedule.uniform_timesteps(num_steps)), CLEAN]
    result = sample_trajectory(
        student,
        add_noise(generator.normal(mean, deviation, 200_000), draw_many(generator), levels[0]),
        plain_steps(levels, schedule, 1.0),
        draw=lambda _: draw_many(generator),
    )
    assert result.mean() == pytest.approx(mean, abs=0.01)
    assert result.std() == pytest.approx(deviation, rel=0.01)


def draw_many(generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal(200_000)


@pytest.mark.parametrize("schedule", [Vp(), Flow(), TrigFlow()])
def test_many_steps_of_the_perfect_teacher_give_its_distribution(schedule: NoiseSchedule) -> None:
    teacher = GaussianMixture(np.array([[-2.0], [2.0]]), [0.1, 0.1], [0.5, 0.5])
    timesteps = schedule.uniform_timesteps(200)
    levels = levels_of(
        schedule, timesteps, [*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0]
    )
    noise = np.random.default_rng(5).standard_normal((20_000, 1))
    side = np.abs(sample_trajectory(teacher.denoise, noise, plain_steps(levels, schedule)))
    assert side.mean() == pytest.approx(2.0, abs=0.02)
    assert side.std() == pytest.approx(math.sqrt(0.1), rel=0.05)
