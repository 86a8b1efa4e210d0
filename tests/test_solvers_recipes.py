"""Training-free recipes: what was fitted on the boundary is what every pipeline then samples."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.call_arguments import fill_arguments
from fewstep.pipeline.pipeline_denoiser import PipelineDenoiser
from fewstep.pipeline.stock_base import describe_base
from fewstep.recipe import FewStepRecipe, Guidance
from fewstep.solvers.bespoke import run_solver
from fewstep.solvers.flow_frame import even_levels, grid_of, refined_levels
from fewstep.solvers.problem import FitSettings, Problem
from fewstep.solvers.teacher_path import mean_square, teacher_states
from fewstep.solvers.training_free import Kind, fitted_recipe, searched_recipe
from tests.tiny_pipelines import ALL_FAMILIES, SD3, SD15, TinyFamily

EVERY_FAMILY = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
SEEDS = (3, 4)


def problem_of(family: TinyFamily, pipe: Any) -> Problem:
    """As `prepare` makes it, but from prompt embeddings: tiny pipelines have no text encoder."""
    base = describe_base(pipe)
    recipe = family.recipe(base=base, guidance=Guidance())
    arguments = fill_arguments(type(pipe), family.arguments(2), recipe, num_steps=4, seed=None)
    denoise = PipelineDenoiser(pipe, arguments)
    noise = denoise.noise(SEEDS)
    first = even_levels(base.schedule.build(), 1)[0]
    settings = FitSettings(prompts=("one", "two"), teacher_steps=12)
    return Problem(denoise, noise * first.sigma, base, Guidance(), settings, "tiny")


def sampled(family: TinyFamily, recipe: FewStepRecipe) -> torch.Tensor:
    """The last step's result of a wrapped pipeline, before any unpacking."""
    wrapped: Any = FewStepPipeline.wrap(family.build(), recipe=recipe)
    wrapped.set_progress_bar_config(disable=True)
    ends = []
    step = wrapped.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        ends.append((result if isinstance(result, tuple) else result.to_tuple())[0])
        return result

    wrapped.scheduler.step = watched
    wrapped(**family.arguments(2), seed=list(SEEDS))
    return ends[-1]


def target_of(problem: Problem) -> torch.Tensor:
    return teacher_states(problem.denoise, problem.sample, problem.teacher_levels)[-1]


@EVERY_FAMILY
def test_a_fitted_recipe_samples_what_was_fitted(family: TinyFamily) -> None:
    """Through JSON and the family's own pipeline: the end is as near the teacher as measured."""
    problem = problem_of(family, family.build())
    recipe = fitted_recipe(problem, "d-ode", (3,))
    end = sampled(family, FewStepRecipe.from_json(recipe.to_json()))
    scores = recipe.provenance.scores or {}
    fine = refined_levels(problem.schedule, recipe.levels(), 4)  # 12 teacher steps over 3
    target = teacher_states(problem.denoise, problem.sample, fine)[-1]
    assert mean_square(end, target) == pytest.approx(scores["mse_3_calls"], rel=1e-2, abs=1e-9)
    expected = run_solver(problem.denoise, problem.sample, problem.schedule, recipe.grids[0])
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [SD15, SD3], ids=lambda family: family.name)
@pytest.mark.parametrize("kind", ["bespoke-rk1", "bespoke-rk2"])
def test_a_bespoke_recipe_improves_in_the_pipeline_itself(family: TinyFamily, kind: Kind) -> None:
    problem = problem_of(family, family.build())
    recipe = fitted_recipe(problem, kind, (4,), num_rounds=1)
    scores = recipe.provenance.scores or {}
    assert scores["mse_4_calls"] < scores["mse_4_calls_plain"]
    error = mean_square(sampled(family, recipe), target_of(problem))
    assert error == pytest.approx(scores["mse_4_calls"], rel=2e-2)


@pytest.mark.parametrize("family", [SD15, SD3], ids=lambda family: family.name)
def test_a_searched_recipe_holds_one_grid_per_count_and_says_where_from(
    family: TinyFamily,
) -> None:
    problem = problem_of(family, family.build())
    recipe = searched_recipe(problem, (2, 4))
    assert [grid.num_steps for grid in recipe.grids] == [2, 4]
    assert recipe.default_steps == 4
    provenance = recipe.provenance
    assert provenance.objective is not None
    assert provenance.objective.startswith("optimal steps, training-free: 12-step teacher, 2 pic")
    assert provenance.source == "arXiv:2503.21774"
    assert provenance.teacher == "tiny, guidance 1"
    assert len(provenance.config_hash or "") == 64
    scores = provenance.scores or {}
    assert scores["mse_4_calls"] <= scores["mse_4_calls_plain"]
    error = mean_square(sampled(family, recipe), target_of(problem))
    assert error == pytest.approx(scores["mse_4_calls"], rel=1e-3)


def test_a_fit_on_a_searched_grid_keeps_the_grid_and_does_better() -> None:
    problem = problem_of(SD3, SD3.build())
    searched = searched_recipe(problem, (3,))
    fitted = fitted_recipe(problem, "d-ode", (3,), on=searched)
    assert fitted.grids[0].sigmas == searched.grids[0].sigmas
    assert fitted.grids[0].solver
    scores = fitted.provenance.scores or {}
    assert scores["mse_3_calls"] <= scores["mse_3_calls_plain"]


def test_the_hash_follows_the_settings() -> None:
    problem = problem_of(SD3, SD3.build())
    other = replace(problem, settings=replace(problem.settings, seed=1))
    hashes = {searched_recipe(p, (2,)).provenance.config_hash for p in (problem, other)}
    assert len(hashes) == 2


def test_a_midpoint_solver_needs_an_even_number_of_calls_and_no_grid() -> None:
    problem = problem_of(SD3, SD3.build())
    with pytest.raises(ConfigError, match="calls the network twice a step.*got 3"):
        fitted_recipe(problem, "bespoke-rk2", (3,))
    even = FewStepRecipe(
        base=problem.base, grids=(grid_of(even_levels(problem.schedule, 4)),), default_steps=4
    )
    with pytest.raises(ConfigError, match="and no grid"):
        fitted_recipe(problem, "bespoke-rk2", (4,), on=even)


def test_settings_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs prompts, got none"):
        FitSettings(prompts=())
    with pytest.raises(ConfigError, match="teacher_steps >= 2"):
        FitSettings(prompts=("a",), teacher_steps=1)
