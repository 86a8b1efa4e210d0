"""Steps go to the expert that the recipe says, in the numbers of any MODEL."""

import math
from dataclasses import replace

import pytest
import torch

from fewstep.comfy_nodes.expert_phases import (
    PhaseRun,
    phase_at,
    phase_bounds,
    phase_runs,
    phases_of_steps,
)
from fewstep.recipe import Expert, FewStepRecipe
from fewstep.zoo import entries
from tests.tiny.recipes import flow_recipe, vp_recipe


def with_experts(recipe: FewStepRecipe, at: float) -> FewStepRecipe:
    """Two experts that meet at this sigma."""
    grid = recipe.grids[0]
    experts = (
        Expert(adapter="high", sigma_high=1.0, sigma_low=at),
        Expert(adapter="low", sigma_high=at, sigma_low=0.0),
    )
    chosen = tuple(0 if sigma >= at else 1 for sigma in grid.sigmas[:-1])
    return replace(recipe, experts=experts, grids=(replace(grid, experts=chosen),))


def comfy_sigmas(recipe: FewStepRecipe, grid: int = 0) -> list[float]:
    """A grid as ComfyUI has it, rounded to float32."""
    count = recipe.grids[grid].num_steps
    is_flow = recipe.base.schedule.kind == "flow"
    exact = [s.sigma if is_flow else s.sigma / s.alpha for s in recipe.levels(count)]
    return torch.tensor(exact, dtype=torch.float32).tolist()


@pytest.mark.parametrize("make", [flow_recipe, vp_recipe])
@pytest.mark.parametrize("place", [1, 2])
def test_a_step_exactly_at_the_boundary_is_the_noisier_experts(make, place: int) -> None:
    recipe = make("sd3")
    recipe = with_experts(recipe, recipe.grids[0].sigmas[place])
    sigmas = comfy_sigmas(recipe)
    assert phases_of_steps(recipe, sigmas) == recipe.grids[0].experts
    bounds = phase_bounds(recipe, sigmas)
    assert tuple(phase_at(bounds, s) for s in sigmas[:-1]) == recipe.grids[0].experts


def test_every_recipe_of_the_zoo_with_experts() -> None:
    recipes = [entry.recipe for entry in entries() if entry.recipe and entry.recipe.experts]
    assert recipes
    for recipe in recipes:
        for index, grid in enumerate(recipe.grids):
            assert phases_of_steps(recipe, comfy_sigmas(recipe, index)) == grid.experts


def test_the_bound_is_halfway() -> None:
    recipe = with_experts(flow_recipe("wan"), 0.7)
    sigmas = [1.0, 0.9, 0.6, 0.3, 0.0]
    assert phase_bounds(recipe, sigmas) == (pytest.approx(0.75),)


def test_a_phase_without_steps_is_never_called() -> None:
    recipe = with_experts(flow_recipe("wan"), 0.7)
    assert phase_bounds(recipe, [0.6, 0.3, 0.0]) == (math.inf,)
    assert phase_at((math.inf,), 0.6) == 1
    assert phase_at(phase_bounds(recipe, [0.9, 0.8]), 0.85) == 0


def test_runs_are_neighbouring_steps() -> None:
    assert phase_runs((0, 0, 1, 2, 2)) == (PhaseRun(0, 0, 2), PhaseRun(1, 2, 3), PhaseRun(2, 3, 5))
    assert phase_runs(()) == ()
