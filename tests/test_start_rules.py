"""Start rules of image to image: which steps a strength means, and their closed form."""

import math
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest

from fewstep.errors import PipelineError
from fewstep.noise_schedule import CLEAN
from fewstep.recipe import Expert, FewStepRecipe, Grid, Sampler, Schedule, SolverRow
from fewstep.recipe_plan import plan_steps
from fewstep.start_rules import START_RULES, insert_start, snap_start, start_rule
from fewstep.trajectory import sample_trajectory
from tests.tiny.recipes import FLOW_GRID, flow_recipe, vp_recipe

EVEN = flow_recipe("sd3", (1000.0, 750.0, 500.0, 250.0))
SHIFTED = flow_recipe("wan", FLOW_GRID)
VP = vp_recipe("sd15")
RULES = pytest.mark.parametrize("rule", sorted(START_RULES))


def sigmas(recipe: FewStepRecipe, rule: str, strength: float) -> list[float]:
    start = start_rule(rule)(recipe, plan_steps(recipe), strength)
    return [step.level.sigma for step in start.plan[start.index :]]


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.3, 1), (0.7, 1), (0.85, 2), (0.95, 3), (1.0, 4), (0.0, 1)],
)
def test_snap_keeps_the_trained_levels_nearest_first(strength: float, expected: int) -> None:
    """A shifted grid keeps its low noise for weak edits: sigma .625 is the least it has."""
    assert sigmas(SHIFTED, "snap", strength) == list(SHIFTED.grids[0].sigmas[-1 - expected : -1])


def test_of_two_equally_near_levels_the_noisier_is_taken() -> None:
    assert sigmas(EVEN, "snap", 0.625) == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("strength", [0.05, 0.25, 0.3, 0.6, 0.8, 0.99, 1.0])
def test_insert_begins_exactly_at_the_strength_then_the_trained_tail(strength: float) -> None:
    tail = [sigma for sigma in (1.0, 0.75, 0.5, 0.25) if sigma < strength]
    assert sigmas(EVEN, "insert", strength) == pytest.approx([strength, *tail])


@pytest.mark.parametrize("strength", [0.1, 0.4, 0.8])
def test_insert_on_a_vp_schedule_begins_at_the_fraction_of_its_time(strength: float) -> None:
    schedule = VP.base.schedule.build()
    start = insert_start(VP, plan_steps(VP), strength)
    assert start.plan[0].level.timestep == pytest.approx(1000.0 * strength)
    sigma = schedule.sigma_of_timestep(1000.0 * strength)
    assert start.plan[0].level.sigma == pytest.approx(sigma, abs=1e-12)


def test_insert_adds_no_more_noise_than_was_trained() -> None:
    recipe = flow_recipe("sd3", (800.0, 400.0))
    assert sigmas(recipe, "insert", 0.9) == [0.8, 0.4]
    assert sigmas(VP, "insert", 1.0) == list(VP.grids[0].sigmas[:-1])


@RULES
@pytest.mark.parametrize("strength", [0.01, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("recipe", [EVEN, SHIFTED, VP], ids=["even", "shifted", "vp"])
def test_every_step_begins_where_the_one_before_ends(
    recipe: FewStepRecipe, strength: float, rule: str
) -> None:
    start = start_rule(rule)(recipe, plan_steps(recipe), strength)
    steps = start.plan[start.index :]
    assert steps
    for step, after in zip(steps, steps[1:], strict=False):
        assert step.following.sigma == after.level.sigma
    assert steps[-1].following == CLEAN


@RULES
@pytest.mark.parametrize("stochasticity", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
def test_a_perfect_network_gives_the_picture_back(
    rule: str, strength: float, stochasticity: float
) -> None:
    """With x0 known exactly, every level on the way holds `alpha x0 + sigma n` of unit noise."""
    recipe = replace(EVEN, sampler=Sampler(stochasticity=stochasticity))
    start = start_rule(rule)(recipe, plan_steps(recipe), strength)
    steps = start.plan[start.index :]
    generator = np.random.default_rng(0)
    x0 = np.full(40_000, 0.7)
    noise = generator.standard_normal(x0.shape)
    level = steps[0].level
    seen = []

    def denoise(sample: np.ndarray, now: object) -> np.ndarray:
        seen.append(sample)
        return x0

    result = sample_trajectory(
        denoise,
        level.alpha * x0 + level.sigma * noise,
        steps,
        draw=lambda size: generator.standard_normal(x0.shape),
    )
    assert np.array_equal(result, x0)
    for sample, step in zip(seen, steps, strict=True):
        implied = (sample - step.level.alpha * x0) / step.level.sigma
        assert implied.mean() == pytest.approx(0.0, abs=0.02)
        assert implied.std() == pytest.approx(1.0, abs=0.02)


@RULES
@pytest.mark.parametrize("first_noise", ["scaled", "unit"])
@pytest.mark.parametrize("stochasticity", [0.0, 0.4])
@pytest.mark.parametrize("recipe", [flow_recipe("sd3", (800.0, 400.0)), VP], ids=["flow", "vp"])
def test_noise_correction_is_not_for_a_sample_that_holds_a_picture(
    recipe: FewStepRecipe, stochasticity: float, first_noise: Any, rule: str
) -> None:
    sampler = Sampler(stochasticity=stochasticity, first_noise=first_noise)
    plain = plan_steps(replace(recipe, sampler=sampler))
    recipe = replace(recipe, sampler=replace(sampler, noise_correction=True))
    plan = plan_steps(recipe)
    assert plan[0].weights != plain[0].weights
    start = start_rule(rule)(recipe, plan, 1.0)
    for found, expected in zip(start.plan, plain, strict=True):
        assert astuple(found.weights) == pytest.approx(astuple(expected.weights), abs=1e-12)
        assert astuple(found.plain) == pytest.approx(astuple(expected.plain), abs=1e-12)


def test_a_clock_of_its_own_does_not_move_the_start() -> None:
    """NitroSD tells its network a fraction of the time; strength is about noise, not about that."""
    grid = VP.grids[0]
    slow = replace(VP, grids=(replace(grid, clock=tuple(t / 4 for t in grid.timesteps)),))
    start = snap_start(slow, plan_steps(slow), 0.5)
    assert start.index == 2
    assert start.plan[2].level.timestep == pytest.approx(499.0 / 4)


def test_an_inserted_step_belongs_to_the_expert_of_its_noise() -> None:
    experts = (
        Expert(adapter="high", sigma_high=1.0, sigma_low=0.6),
        Expert(adapter="low", sigma_high=0.6, sigma_low=0.0),
    )
    grid = replace(EVEN.grids[0], experts=(0, 0, 1, 1))
    recipe = replace(EVEN, experts=experts, grids=(grid,))
    for strength, expected in ((0.7, [0, 1, 1]), (0.55, [1, 1, 1])):
        start = insert_start(recipe, plan_steps(recipe), strength)
        assert [step.expert for step in start.plan] == expected


def test_angles_are_fractions_of_a_right_angle() -> None:
    schedule = Schedule(kind="trigflow", sigma_data=0.5)
    recipe = flow_recipe("sana-sprint", (1.5, 0.75), prediction="trigflow", schedule=schedule)
    start = insert_start(recipe, plan_steps(recipe), 0.6)
    assert start.plan[0].level.timestep == pytest.approx(0.3 * math.pi)
    assert snap_start(recipe, plan_steps(recipe), 0.6).index == 1


def with_grid(recipe: FewStepRecipe, **changes: object) -> FewStepRecipe:
    return replace(recipe, grids=(replace(recipe.grids[0], **changes),))


ROWS = (SolverRow(sample=0.5, x0=0.5),) * 4
LADDER = replace(
    with_grid(replace(EVEN, sampler=Sampler(stochasticity=1.0)), sizes=(0.5, 0.5, 1.0, 1.0))
)


@pytest.mark.parametrize(
    ("rule", "recipe", "strength", "words"),
    [
        ("snap", EVEN, 1.5, "strength must be 0 to 1, got 1.5"),
        ("insert", EVEN, -0.1, "strength must be 0 to 1, got -0.1"),
        ("insert", EVEN, 0.0, "strength 0 is no more noise than this grid ends at"),
        ("insert", with_grid(EVEN, solver=ROWS), 0.6, "a fitted solver, which is only known at"),
        ("insert", with_grid(VP, clock=(900.0, 600.0, 300.0, 100.0)), 0.6, "a clock of its own"),
        ("insert", with_grid(EVEN, stops=(0.1, 0.1, 0.1, 0.0)), 0.6, "stops of its own"),
        ("snap", LADDER, 0.6, "samples grow from step to step"),
        ("nearest", EVEN, 0.6, "strength_rule 'nearest' is unknown; use 'snap' or 'insert'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    rule: str, recipe: FewStepRecipe, strength: float, words: str
) -> None:
    with pytest.raises(PipelineError, match=words):
        start_rule(rule)(recipe, plan_steps(recipe), strength)


def test_a_grid_that_ends_above_clean_data_keeps_its_terminal() -> None:
    grid = Grid(timesteps=(1000.0, 500.0), sigmas=(1.0, 0.5, 0.04))
    recipe = replace(EVEN, grids=(grid,), default_steps=2)
    start = insert_start(recipe, plan_steps(recipe), 0.3)
    assert [step.following.sigma for step in start.plan] == [0.04]
    with pytest.raises(PipelineError, match="ends at .sigma 0.04."):
        insert_start(recipe, plan_steps(recipe), 0.04)
