"""FewStepScheduler is the reference loop of a planned recipe, whatever the recipe carries."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.noise_schedule import Level
from fewstep.recipe import FewStepRecipe, Grid, Sampler, Schedule, SolverRow
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.sampling import from_x0
from fewstep.schedulers import FewStepScheduler
from fewstep.trajectory import PlannedStep, sample_trajectory
from tests.tiny_pipelines import VP_GRID, flow_recipe, vp_recipe

SHAPE = (2, 4, 8, 8)
ROWS = (
    SolverRow(sample=0.9, x0=0.1),
    SolverRow(sample=0.8, x0=0.3, previous_x0=-0.1),
    SolverRow(sample=0.2, x0=0.5, previous_sample=0.3),
    SolverRow(sample=0.0, x0=1.2, previous_x0=-0.2),
)
RENOISING = Sampler(stochasticity=1.0)


def with_grid(recipe: FewStepRecipe, **changes: Any) -> FewStepRecipe:
    grid = replace(recipe.grids[0], **changes)
    return replace(recipe, grids=(grid,), sampler=changes.pop("sampler", recipe.sampler))


RECIPES = {
    "clipped": flow_recipe("sd3", sampler=Sampler(stochasticity=0.3, clip_x0=0.5)),
    "noise correction": vp_recipe("sd15", sampler=Sampler(noise_correction=True)),
    "unit noise": vp_recipe("sdxl", timesteps=(399.0,), sampler=Sampler(first_noise="unit")),
    "fitted": with_grid(flow_recipe("sd3"), solver=ROWS),
    "clock": with_grid(vp_recipe("sdxl"), clock=(249.75, 187.25, 124.75, 62.25)),
    "read at its clock": with_grid(
        vp_recipe("sdxl", sampler=RENOISING),
        clock=(249.75, 187.25, 124.75, 62.25),
        read_at="clock",
    ),
    "ancestral": with_grid(flow_recipe("sd3"), stops=(0.8, 0.5, 0.3, 0.0)),
    "growing": with_grid(flow_recipe("sd3", sampler=RENOISING), sizes=(0.5, 0.5, 0.75, 1.0)),
    "trigflow": flow_recipe(
        "sana-sprint",
        (1.5, 1.0),
        prediction="trigflow",
        schedule=Schedule(kind="trigflow", sigma_data=1.0),
        sampler=RENOISING,
    ),
}


def x0_of(sample: Tensor, level: Level) -> Tensor:
    """A network that knows its clock; any function of both will do."""
    return torch.tanh(1.7 * sample) * (1.0 + level.timestep / 1000.0)


def draws(recipe: FewStepRecipe) -> Any:
    generator = torch.Generator().manual_seed(3)

    def draw(size: float) -> Tensor:
        length = round(SHAPE[-1] * size)
        return torch.randn((*SHAPE[:2], length, length), generator=generator)

    return draw


def resized(x0: Tensor, size: float) -> Tensor:
    length = round(SHAPE[-1] * size)
    return torch.nn.functional.interpolate(x0, size=(length, length), mode="bicubic")


def by_reference(recipe: FewStepRecipe) -> Tensor:
    steps, draw = plan_steps(recipe), draws(recipe)
    first = first_noise_scale(recipe, steps[0].level) * draw(steps[0].size)
    return sample_trajectory(x0_of, first, steps, draw=draw, resize=resized)


def by_scheduler(recipe: FewStepRecipe) -> Tensor:
    scheduler = FewStepScheduler(recipe)
    generator = torch.Generator().manual_seed(3)
    scheduler.ladder.start(*SHAPE[2:])
    length = round(SHAPE[-1] * scheduler.plan[0].size)
    shape = (*SHAPE[:2], length, length)
    sample = scheduler.init_noise_sigma * torch.randn(shape, generator=generator)
    for planned, timestep in zip(scheduler.plan, scheduler.timesteps, strict=False):
        assert float(timestep) == pytest.approx(planned.level.timestep)
        x0 = x0_of(sample, planned.reading)
        output = from_x0(recipe.base.prediction, x0, sample, planned.reading)
        sample = scheduler.step(output, timestep, sample, generator, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("name", RECIPES)
def test_the_scheduler_is_the_reference_loop(name: str) -> None:
    recipe = RECIPES[name]
    expected, got = by_reference(recipe), by_scheduler(recipe)
    assert got.shape == SHAPE
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_each_extra_changes_the_result(name: str) -> None:
    """Else the test above would pass with the field ignored."""
    recipe = RECIPES[name]
    plain = replace(
        recipe,
        grids=tuple(Grid(timesteps=g.timesteps, sigmas=g.sigmas) for g in recipe.grids),
        sampler=Sampler(stochasticity=recipe.sampler.stochasticity),
    )
    if plain != recipe:
        assert not torch.allclose(by_reference(recipe), by_reference(plain), rtol=1e-3)


def test_whoever_listens_is_told_each_network_call_before_it_is_made() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3"))
    told: list[float] = []
    scheduler.before_call = lambda planned: told.append(planned.level.timestep)
    scheduler.set_timesteps(4)
    sample = torch.zeros(SHAPE)
    for timestep in scheduler.timesteps:
        assert told[-1] == pytest.approx(float(timestep))
        sample = scheduler.step(sample, timestep, sample)[0]
    assert len(told) == 4
    scheduler.set_begin_index(2)
    assert told[-1] == pytest.approx(float(scheduler.timesteps[2]))


def test_clean_data_can_be_replaced_before_the_step() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3"))
    seen: list[PlannedStep] = []

    def refine(x0: Tensor, planned: PlannedStep) -> Tensor:
        seen.append(planned)
        return torch.full_like(x0, 7.0)

    scheduler.refine_x0 = refine
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample)[0]
    assert seen == list(scheduler.plan)
    torch.testing.assert_close(sample, torch.full(SHAPE, 7.0))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_steps_x0_is_the_picture_for_pipelines_that_take_that_one(steps: int) -> None:
    """The latent consistency pipelines, SANA-Sprint and one-step PixArt decode x0."""
    recipe = vp_recipe("sd15", timesteps=VP_GRID[:steps], stochasticity=1.0)
    recipe = replace(recipe, sampler=replace(recipe.sampler, clip_x0=0.5))
    scheduler = FewStepScheduler(recipe)
    generator = torch.Generator().manual_seed(5)
    sample = x0 = torch.randn(1, 4, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        output = torch.randn(1, 4, 8, 8, generator=generator)
        sample, x0 = scheduler.step(output, timestep, sample, generator, return_dict=False)
    assert torch.equal(x0, sample)
    assert float(x0.abs().max()) <= 0.5 + 1e-6
