"""fewstep/noise_schedule.py: the tables are diffusers', and shifting happens exactly once."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_scm import SCMScheduler

from fewstep.errors import ConfigError
from fewstep.noise_schedule import (
    CLEAN,
    Flow,
    Level,
    NoiseSchedule,
    TrigFlow,
    Vp,
    levels_of,
    shift_sigma,
)

VP_TABLES = [("scaled_linear", 0.00085, 0.012), ("linear", 0.0001, 0.02)]
ALL_SCHEDULES = [
    Vp(),
    Vp(0.0001, 0.02, "linear"),
    Flow(),
    Flow(shift=5.0),
    Flow(shift=3.0, num_train_timesteps=1),
    TrigFlow(),
]


def top_of(schedule: NoiseSchedule) -> float:
    return schedule.uniform_timesteps(1)[0]


@pytest.mark.parametrize(("kind", "start", "end"), VP_TABLES)
def test_vp_table_is_diffusers(
    kind: Literal["scaled_linear", "linear"], start: float, end: float
) -> None:
    ddpm = DDPMScheduler(beta_schedule=kind, beta_start=start, beta_end=end)
    schedule = Vp(start, end, kind)
    expected = (1.0 - ddpm.alphas_cumprod.double()).sqrt().numpy()
    np.testing.assert_allclose(schedule.sigmas(), expected, atol=3e-6)  # theirs is float32
    levels = [schedule.level(float(t)) for t in (0, 1, 249, 499, 999)]
    for level in levels:
        assert level.alpha == pytest.approx(
            math.sqrt(float(ddpm.alphas_cumprod[int(level.timestep)])), rel=1e-4
        )


def test_vp_table_starts_and_ends_where_stable_diffusions_does() -> None:
    assert Vp().sigma_of_timestep(0.0) == pytest.approx(math.sqrt(0.00085), rel=1e-9)
    assert Vp().level(999.0).alpha == pytest.approx(0.0682, abs=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_flow_grid_is_diffusers_grid_shifted_once(shift: float, num_steps: int) -> None:
    diffusers = FlowMatchEulerDiscreteScheduler(shift=shift)
    # its own default grid shifts twice; sigmas given unshifted are shifted once
    diffusers.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist())
    timesteps = Flow(shift).uniform_timesteps(num_steps)
    np.testing.assert_allclose(timesteps, np.asarray(diffusers.timesteps), rtol=1e-6)
    sigmas = [Flow(shift).sigma_of_timestep(t) for t in timesteps]
    np.testing.assert_allclose([*sigmas, 0.0], np.asarray(diffusers.sigmas), rtol=1e-6)


def test_trigflow_endpoints_are_those_of_diffusers_scm() -> None:
    diffusers = SCMScheduler()
    diffusers.set_timesteps(4, intermediate_timesteps=None)
    timesteps = (*TrigFlow().uniform_timesteps(4), 0.0)
    np.testing.assert_allclose(timesteps, np.asarray(diffusers.timesteps), atol=5e-6)
    start = TrigFlow().level(1.5708)  # theirs, a little beyond pi / 2
    assert (start.alpha, start.sigma) == (pytest.approx(0.0, abs=1e-7), 1.0)
    assert TrigFlow().level(0.0) == CLEAN


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_timestep_to_sigma_and_back(schedule: NoiseSchedule) -> None:
    for part in (0.001, 0.0213, 0.25, 0.4995, 0.75, 0.999, 1.0):
        timestep = part * top_of(schedule)
        level = schedule.level(timestep)
        assert schedule.timestep_of_sigma(level.sigma) == pytest.approx(timestep, rel=1e-9)
        assert schedule.alpha_of_sigma(level.sigma) == level.alpha


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_noise_grows_and_signal_falls_with_the_timestep(schedule: NoiseSchedule) -> None:
    levels = [schedule.level(t) for t in np.linspace(0.0, top_of(schedule), 50)]
    assert all(a.sigma < b.sigma and a.alpha > b.alpha for a, b in itertools.pairwise(levels))
    if isinstance(schedule, Flow):
        assert all(level.alpha + level.sigma == pytest.approx(1.0) for level in levels)
    else:
        assert all(math.hypot(level.alpha, level.sigma) == pytest.approx(1.0) for level in levels)


def test_uniform_timesteps_are_the_published_grids() -> None:
    assert Vp().uniform_timesteps(4) == (999.0, 749.0, 499.0, 249.0)
    assert Flow(5.0).uniform_timesteps(4) == pytest.approx((1000, 937.5, 833.333333, 625))
    assert Flow(3.0).uniform_timesteps(8) == pytest.approx(
        (1000, 954.545, 900, 833.333, 750, 642.857, 500, 300), abs=1e-3
    )
    assert Flow(1.0).uniform_timesteps(4) == (1000.0, 750.0, 500.0, 250.0)
    assert Flow(8.0).uniform_timesteps(4) == pytest.approx((1000, 960, 888.889, 727.273), abs=1e-3)


def test_vp_uniform_timesteps_are_diffusers_trailing_spacing() -> None:
    diffusers = DDIMScheduler(timestep_spacing="trailing")
    for num_steps in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 30, 50, 100, 1000):
        diffusers.set_timesteps(num_steps)
        assert list(Vp().uniform_timesteps(num_steps)) == diffusers.timesteps.tolist()
    with pytest.raises(ConfigError, match="1001 steps do not fit into 1000 timesteps; use fewer"):
        Vp().uniform_timesteps(1001)


def test_shift_shapes_new_grids_and_nothing_else() -> None:
    plain, shifted = Flow(1.0), Flow(5.0)
    for timestep in (0.0, 24.4, 625.0, 937.5, 1000.0):
        assert shifted.level(timestep) == plain.level(timestep)
        sigma = shifted.sigma_of_timestep(timestep)
        assert shifted.timestep_of_sigma(sigma) == pytest.approx(timestep)
    assert [u for u in (0.0, 0.3, 1.0) if shift_sigma(u, 1.0) != u] == []
    grid = shifted.uniform_timesteps(4)
    levels = levels_of(shifted, grid, [*(t / 1000 for t in grid), 0.0])
    assert [level.timestep for level in levels] == [*grid, 0.0]


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_via_is_exact_at_both_ends_and_between_them_otherwise(schedule: NoiseSchedule) -> None:
    following = schedule.level(0.5 * top_of(schedule))
    assert schedule.via(following, 0.0) is following
    assert schedule.via(following, 1.0) is CLEAN
    assert schedule.via(CLEAN, 0.3) is CLEAN
    assert 0.0 < schedule.via(following, 0.3).sigma < following.sigma


def test_via_between_scales_sigma_for_flow_and_the_angle_for_trigflow() -> None:
    assert Flow(3.0).via(Flow().level(800.0), 0.25).sigma == pytest.approx(0.6)
    assert Flow(3.0).via(Flow().level(800.0), 0.25).timestep == pytest.approx(600.0)
    assert TrigFlow().via(TrigFlow().level(1.2), 0.25).timestep == pytest.approx(0.9)


@pytest.mark.parametrize("percent", [1, 7, 10, 16, 20, 30, 50, 60, 70, 80, 90, 99])
def test_vp_via_floors_the_exact_product(percent: int) -> None:
    """Float64 alone would miss (1 - 0.3) * 90 = 63 by one."""
    for timestep in range(1, 1000):
        via = Vp().via(Level(float(timestep), 0.5, 0.5), percent / 100)
        assert via.timestep == (100 - percent) * timestep // 100
        if percent % 10 == 0:  # diffusers' float32 product is off by one at some odd gammas
            tcd = torch.floor((1 - percent / 100) * torch.tensor(timestep))
            assert via.timestep == float(tcd)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_vp_step_to_timestep_0_needs_no_noise(gamma: float) -> None:
    terminal = Vp().level(0.0, 0.0292)  # TCD's end, written with four digits
    assert Vp().via(terminal, gamma) is terminal


def test_levels_of_a_grid() -> None:
    levels = levels_of(Vp(), [999, 499], [0.9977, 0.8499, 0.0])
    assert levels[0] == Level(999.0, math.sqrt(1 - 0.9977**2), 0.9977)
    assert levels[-1] is CLEAN
    above_zero = levels_of(Vp(), [999], [0.9977, Vp().sigma_of_timestep(0.0)])
    assert above_zero[-1].timestep == 0.0
    assert above_zero[-1].sigma == pytest.approx(0.0292, abs=1e-4)


def test_levels_hold_plain_floats() -> None:
    """A numpy scalar in a level would turn float32 samples into float64."""
    level = Flow().level(float(np.float64(500)), np.float64(0.5))
    assert [type(value) for value in (level.timestep, level.alpha, level.sigma)] == [float] * 3


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_a_clock_beyond_the_schedule_is_an_error(schedule: NoiseSchedule) -> None:
    top = top_of(schedule)
    for timestep in (-0.1 * top, 1.1 * top, math.nan):
        with pytest.raises(ConfigError, match=r"timestep \S+ is outside this schedule; use 0 to"):
            schedule.level(timestep)
    with pytest.raises(ConfigError, match="sigma 14.6 is outside this schedule; use 0 to 1"):
        schedule.level(0.5 * top, 14.6)
    with pytest.raises(ConfigError, match="sigma 14.6 is outside"):
        schedule.timestep_of_sigma(14.6)
