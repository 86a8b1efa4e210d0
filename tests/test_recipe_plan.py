"""Planned steps against the definitions of what they stand for: TCD, clipping, noise correction."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from fewstep.noise_schedule import Level, Vp
from fewstep.recipe import FewStepRecipe, Sampler
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.sampling import to_x0
from fewstep.trajectory import sample_trajectory
from tests.tiny_pipelines import flow_recipe, vp_recipe

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SHAPE = (2, 4, 8, 8)
TERMINAL = Vp().sigma_of_timestep(0.0)


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Any function of sample and clock will do; outputs are of the size of noise."""
    return torch.tanh(0.7 * sample) + 0.4 * torch.cos(3.0 * sample + timestep / 300.0)


def ours(recipe: FewStepRecipe) -> torch.Tensor:
    """The planned recipe from seed 0, first noise and fresh noise from one stream."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: float = 1.0) -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator)

    def denoise(sample: torch.Tensor, level: Level) -> torch.Tensor:
        return to_x0("epsilon", network(sample, level.timestep), sample, level)

    return sample_trajectory(denoise, draw(), plan_steps(recipe), draw=draw)


def theirs(scheduler: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        output = network(sample, float(timestep))
        sample = scheduler.step(
            output, timestep, sample, generator=generator, return_dict=False, **options
        )[0]
    return sample


def with_terminal(recipe: FewStepRecipe, terminal: float) -> FewStepRecipe:
    grid = recipe.grids[0]
    return replace(recipe, grids=(replace(grid, sigmas=(*grid.sigmas[:-1], terminal)),))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.3, 0.75])
@pytest.mark.parametrize("timesteps", [None, (999, 871, 519, 123), (999, 279)])
def test_tcd_on_even_and_uneven_grids_is_diffusers_tcd(
    timesteps: tuple[int, ...] | None, gamma: float
) -> None:
    """Deterministic and stochastic; uneven grids are TDD's non-equidistant sampling."""
    scheduler = TCDScheduler(**BETAS)
    if timesteps is None:
        scheduler.set_timesteps(4)
    else:
        scheduler.set_timesteps(timesteps=list(timesteps))
    grid = tuple(float(t) for t in scheduler.timesteps)
    recipe = vp_recipe("sd15", timesteps=grid, stochasticity=gamma)
    expected = theirs(scheduler, eta=gamma)
    result = ours(with_terminal(recipe, TERMINAL))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_clipping_is_diffusers_clip_sample_with_unclipped_noise(limit: float) -> None:
    ddim = DDIMScheduler(
        **BETAS,
        timestep_spacing="trailing",
        clip_sample=True,
        clip_sample_range=limit,
        set_alpha_to_one=True,
    )
    ddim.set_timesteps(4)
    recipe = vp_recipe("sd15", sampler=Sampler(clip_x0=limit))
    # DDIM's own step takes the noise from the network's output unless told otherwise
    expected = theirs(ddim, eta=0.0, use_clipped_model_output=False)
    torch.testing.assert_close(ours(recipe), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_clipping_of_stochastic_steps_is_the_definition(gamma: float) -> None:
    """a (alpha_via clip(x0) + sigma_via eps) + sqrt(sigma^2 - (a sigma_via)^2) noise, by hand."""
    recipe = vp_recipe("sd15", sampler=Sampler(stochasticity=gamma, clip_x0=0.8))
    schedule, levels = Vp(), recipe.levels()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    for now, following in zip(levels, levels[1:], strict=False):
        epsilon = network(sample, now.timestep)
        x0 = ((sample - now.sigma * epsilon) / now.alpha).clip(-0.8, 0.8)
        if following.sigma == 0.0:
            sample = x0
            continue
        via = schedule.via(following, gamma)
        scale = following.alpha / via.alpha
        spread = (following.sigma**2 - (scale * via.sigma) ** 2) ** 0.5
        noise = torch.randn(SHAPE, generator=generator)
        sample = scale * (via.alpha * x0 + via.sigma * epsilon) + spread * noise
    torch.testing.assert_close(ours(recipe), sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_noise", ["unit", "scaled"])
def test_noise_correction_moves_along_the_noise_it_started_from(first_noise: Any) -> None:
    """First step alpha' x0 + sigma' z, z the drawn noise itself, whatever it was scaled with."""
    sampler = Sampler(noise_correction=True, first_noise=first_noise)
    recipe = vp_recipe("sd15", timesteps=(801.0, 399.0), sampler=sampler)
    steps = plan_steps(recipe)
    scale = first_noise_scale(recipe, steps[0].level)
    assert scale == (1.0 if first_noise == "unit" else recipe.levels()[0].sigma)
    assert recipe.levels()[0].sigma < 0.99
    z = np.random.default_rng(0).normal(size=(2, 3))
    x0 = np.random.default_rng(1).normal(size=(2, 3))
    answers = iter([x0, np.zeros_like(x0)])
    seen: list[np.ndarray] = []

    def denoise(sample: np.ndarray, level: Level) -> np.ndarray:
        seen.append(sample)
        return next(answers)

    sample_trajectory(denoise, scale * z, steps)
    following = recipe.levels()[1]
    np.testing.assert_allclose(seen[1], following.alpha * x0 + following.sigma * z, rtol=1e-12)


def test_noise_correction_changes_the_first_step_only() -> None:
    corrected = plan_steps(vp_recipe("sd15", sampler=Sampler(noise_correction=True)))
    plain = plan_steps(vp_recipe("sd15"))
    assert corrected[0].weights != plain[0].weights
    assert [s.weights for s in corrected[1:]] == [s.weights for s in plain[1:]]


def test_noise_correction_changes_nothing_where_the_start_is_noise_alone() -> None:
    """At sigma 1 of a flow schedule the noise implied by the prediction is the sample itself."""
    corrected = plan_steps(flow_recipe("sd3", sampler=Sampler(noise_correction=True)))
    for with_it, without in zip(corrected, plan_steps(flow_recipe("sd3")), strict=True):
        assert with_it.weights == without.weights


def test_a_unit_start_leaves_the_steps_as_they_are() -> None:
    unit = vp_recipe("sd15", timesteps=(399.0,), sampler=Sampler(first_noise="unit"))
    assert first_noise_scale(unit, unit.levels()[0]) == 1.0
    assert plan_steps(unit) == plan_steps(replace(unit, sampler=Sampler()))


def test_a_clock_is_what_the_network_is_told_and_nothing_else() -> None:
    recipe = vp_recipe("sdxl")
    grid = replace(recipe.grids[0], clock=(249.75, 187.25, 124.75, 62.25))
    told = plan_steps(replace(recipe, grids=(grid,)))
    for with_clock, plain, clock in zip(told, plan_steps(recipe), grid.clock, strict=True):
        assert with_clock.level == Level(clock, plain.level.alpha, plain.level.sigma)
        assert with_clock.weights == plain.weights
        assert with_clock.following == plain.following
