"""What a grid may carry beside timesteps and sigmas: the rules, and the shift by image size."""

from dataclasses import replace
from typing import Any

import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from fewstep.errors import RecipeError
from fewstep.recipe import (
    Base,
    Expert,
    FewStepRecipe,
    Grid,
    ResolutionShift,
    Sampler,
    Schedule,
    SecondStage,
    SolverRow,
)

FLUX_SHIFT = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)


def grid(**changes: Any) -> Grid:
    return replace(Grid(timesteps=(1000.0, 500.0), sigmas=(1.0, 0.5, 0.0)), **changes)


def recipe(**changes: Any) -> FewStepRecipe:
    base = Base(family="flux", prediction="flow", schedule=Schedule(kind="flow", shift=1.0))
    changes.setdefault("grids", (grid(),))
    return FewStepRecipe(base=base, default_steps=2, **changes)


EULER = SolverRow(sample=0.5, x0=0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"read_at": "clock"}, "a clock it does not have"),
        ({"stops": (0.6, 0.0)}, "stops at sigma 0.6 on its way to 0.5"),
        ({"clock": (250.0,)}, "1 values in clock; wanted 2 or none"),
        ({"sizes": (0.5, 0.75)}, r"sizes \[0.5, 0.75\]; wanted fractions above 0 that rise to 1"),
        ({"sizes": (1.0, 0.5)}, "rise to 1"),
        ({"sizes": (0.0, 1.0)}, "above 0"),
        ({"solver": (EULER,)}, "1 values in solver"),
        ({"solver": (EULER, EULER), "sizes": (0.5, 1.0)}, "sizes and a solver"),
        ({"solver": (SolverRow(sample=1.0, x0=0.0, previous_x0=0.1), EULER)}, "call before it"),
    ],
)
def test_a_grid_that_contradicts_itself_is_one_sentence(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        grid(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": (grid(sizes=(0.5, 1.0)),)}, "changes size between steps.*stochasticity 1"),
        (
            {"grids": (grid(solver=(EULER, EULER)),), "sampler": Sampler(stochasticity=1.0)},
            "deterministic as it is",
        ),
        (
            {"grids": (grid(stops=(0.2, 0.0)),), "resolution_shift": FLUX_SHIFT},
            "has stops, which a resolution_shift does not move",
        ),
        (
            {"grids": (grid(solver=(EULER, EULER)),), "resolution_shift": FLUX_SHIFT},
            "has solver, which a resolution_shift does not move",
        ),
        (
            {"grids": (grid(stops=(0.2, 0.0)),), "sampler": Sampler(stochasticity=0.5)},
            "has stops",
        ),
        (
            {"grids": (grid(solver=(EULER, EULER)),), "sampler": Sampler(clip_x0=1.0)},
            "no clip_x0",
        ),
        (
            {
                "grids": (grid(experts=(0, 0)),),
                "steps": "any",
                "experts": (Expert(adapter="all", sigma_high=1.0, sigma_low=0.0),),
                "second_stage": SecondStage(grid=grid()),
            },
            "experts and second_stage",
        ),
    ],
)
def test_parts_that_contradict_each_other_are_one_sentence(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**changes)


def test_a_clip_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="clip_x0 must be above 0"):
        Sampler(clip_x0=0.0)


def test_everything_survives_json() -> None:
    full = recipe(
        grids=(grid(clock=(250.0, 125.0), sizes=(0.5, 1.0)),),
        sampler=Sampler(stochasticity=1.0, first_noise="unit", clip_x0=2.0, noise_correction=True),
        second_stage=SecondStage(grid=grid(sigmas=(1.0, 0.5, 0.0)), upscale=1.5),
        resolution_shift=FLUX_SHIFT,
    )
    assert FewStepRecipe.from_json(full.to_json()) == full
    fitted = recipe(grids=(grid(solver=(EULER, SolverRow(sample=0.0, x0=1.0, previous_x0=0.2))),))
    assert FewStepRecipe.from_json(fitted.to_json()) == fitted


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6000])
def test_mu_is_what_flux_pipelines_pass(tokens: int) -> None:
    expected = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert FLUX_SHIFT.mu(tokens, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 9000])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_mu_is_what_flux2_klein_passes(tokens: int, steps: int) -> None:
    rule = ResolutionShift(rule="flux2_empirical")
    assert rule.mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_a_size_dependent_grid_is_stored_unshifted_and_shifted_for_a_size() -> None:
    sized = recipe(resolution_shift=FLUX_SHIFT)
    assert sized.grid() == grid()
    shifted = sized.grid(mu=FLUX_SHIFT.mu(4096, 2))
    # exp(1.15) * 0.5 / (1 + (exp(1.15) - 1) * 0.5)
    assert shifted.sigmas == pytest.approx((1.0, 0.7595109, 0.0))
    assert shifted.timesteps == pytest.approx((1000.0, 759.5109))
    assert [level.sigma for level in sized.levels(mu=1.15)] == pytest.approx(shifted.sigmas)


def test_mu_means_nothing_to_a_grid_that_is_final() -> None:
    assert recipe().grid(mu=1.15) == grid()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_shift": 0.5}, "needs max_shift"),
        ({"rule": "flux2_empirical", "base_shift": 0.5}, "does not take base_shift"),
        (
            {"base_shift": 0.5, "max_shift": 1.0, "base_tokens": 9, "max_tokens": 9},
            "base_tokens < max_tokens",
        ),
    ],
)
def test_a_shift_rule_has_exactly_its_numbers(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ResolutionShift(**values)


def test_the_second_stage_is_a_recipe_of_its_own() -> None:
    second = Grid(timesteps=(909.375, 421.875), sigmas=(0.909375, 0.421875, 0.0))
    both = recipe(second_stage=SecondStage(grid=second))
    assert both.for_second_stage().grid() == second
    assert both.for_second_stage().second_stage is None
    with pytest.raises(RecipeError, match="one stage"):
        recipe().for_second_stage()
