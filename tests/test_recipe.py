"""fewstep/recipe.py: recipes survive JSON, and every rule answers with one clear sentence."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep import strict_json
from fewstep.errors import RecipeError, RecipeVersionError
from fewstep.noise_schedule import CLEAN, Vp
from fewstep.recipe import (
    Base,
    Expert,
    FewStepRecipe,
    Grid,
    Guidance,
    Lora,
    Provenance,
    ResolutionShift,
    Sampler,
    Schedule,
)

SD_SCHEDULE = Schedule(kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def vp_grid(*timesteps: float, terminal: float = 0.0) -> Grid:
    sigmas = tuple(Vp().sigma_of_timestep(t) for t in timesteps)
    return Grid(timesteps=timesteps, sigmas=(*sigmas, terminal))


def sdxl_dmd2() -> FewStepRecipe:
    """tianweiy/DMD2's published SDXL grid, re-noising, no guidance."""
    return FewStepRecipe(
        base=Base(family="sdxl", prediction="epsilon", schedule=SD_SCHEDULE),
        grids=(vp_grid(999.0), vp_grid(999.0, 749.0, 499.0, 249.0)),
        default_steps=4,
        sampler=Sampler(stochasticity=1.0),
        provenance=Provenance(objective="dmd2", scores={"frechet": 3.5}, licence="cc-by-nc-4.0"),
    )


def wan_two_experts() -> FewStepRecipe:
    """Wan 2.2's shape: flow at shift 5, two adapters that meet at sigma 0.875."""
    return FewStepRecipe(
        base=Base(
            family="wan",
            prediction="flow",
            schedule=Schedule(kind="flow", shift=5.0),
            model_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            max_sequence_length=512,
        ),
        grids=(
            Grid(
                timesteps=(1000.0, 937.5, 833.333333, 625.0),
                sigmas=(1.0, 0.9375, 0.833333333, 0.625, 0.0),
                experts=(0, 0, 1, 1),
            ),
        ),
        default_steps=4,
        guidance=Guidance(mode="cfg", scale=3.5, negative_prompt="works"),
        lora=Lora(scale=0.125, alpha="baked"),
        experts=(
            Expert(adapter="high_noise", sigma_high=1.0, sigma_low=0.875),
            Expert(adapter="low_noise", sigma_high=0.875, sigma_low=0.0),
        ),
        resolution_shift=ResolutionShift(
            base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096
        ),
    )


def sana_sprint() -> FewStepRecipe:
    """TrigFlow, two steps, guidance embedded in the network."""
    return FewStepRecipe(
        base=Base(
            family="sana",
            prediction="trigflow",
            schedule=Schedule(kind="trigflow", sigma_data=0.5),
        ),
        grids=(Grid(timesteps=(1.5708, 1.3), sigmas=(1.0, math.sin(1.3), 0.0)),),
        default_steps=2,
        sampler=Sampler(stochasticity=1.0),
        guidance=Guidance(mode="embedded", scale=4.5),
    )


def tcd_any() -> FewStepRecipe:
    """TCD: any number of steps, gamma 0.3, ends at timestep 0 instead of clean data."""
    return FewStepRecipe(
        base=Base(family="sd15", prediction="epsilon", schedule=SD_SCHEDULE),
        grids=(vp_grid(999.0, 759.0, 499.0, 259.0, terminal=Vp().sigma_of_timestep(0.0)),),
        default_steps=6,
        steps="any",
        sampler=Sampler(stochasticity=0.3),
    )


ALL_RECIPES = [sdxl_dmd2, wan_two_experts, sana_sprint, tcd_any]


@pytest.mark.parametrize("make", ALL_RECIPES)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_gives_back_an_equal_recipe(
    make: Callable[[], FewStepRecipe], indent: int | None
) -> None:
    recipe = make()
    text = recipe.to_json(indent)
    assert FewStepRecipe.from_json(text) == recipe
    assert FewStepRecipe.from_json(text).to_json(indent) == text
    assert json.loads(text)["format"] == "fewstep.recipe/1"


def test_a_recipe_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        path = tmp_path / f"{encoding}.json"
        path.write_text(sdxl_dmd2().to_json(), encoding=encoding)
        assert FewStepRecipe.from_file(path) == sdxl_dmd2()


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r'recipe\.json: the recipe has no "format" key'):
        FewStepRecipe.from_file(path)
    path.write_text('{"format": "fewstep.recipe/9"}', encoding="utf-8")
    with pytest.raises(RecipeVersionError, match=r"recipe\.json: this recipe has format"):
        FewStepRecipe.from_file(path)
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(RecipeError, match=r"recipe\.json: not UTF-8 text; save it as UTF-8"):
        FewStepRecipe.from_file(path)


def test_defaults_need_not_be_written() -> None:
    data = json.loads(sdxl_dmd2().to_json())
    short = {key: data[key] for key in ("format", "base", "grids", "default_steps", "sampler")}
    short["sampler"] = {"stochasticity": 1}  # JSON does not tell 1 from 1.0
    recipe = FewStepRecipe.from_json(json.dumps(short))
    assert recipe == dataclasses.replace(sdxl_dmd2(), provenance=Provenance())
    assert recipe.guidance == Guidance(mode="none", scale=1.0, negative_prompt="inert")


# --- what a recipe answers --------------------------------------------------------------------


def test_the_grid_of_each_count() -> None:
    recipe = sdxl_dmd2()
    assert recipe.grid() == recipe.grid(4) == recipe.grids[1]
    assert recipe.grid(1).timesteps == (999.0,)
    with pytest.raises(RecipeError) as caught:
        recipe.grid(3)
    assert str(caught.value) == "this model was not made for 3 steps; use 1, 4"


def test_levels_are_ready_for_the_step_function() -> None:
    levels = wan_two_experts().levels()
    assert [level.timestep for level in levels] == [1000.0, 937.5, 833.333333, 625.0, 0.0]
    assert levels[3].alpha == 0.375
    assert levels[-1] is CLEAN
    assert sdxl_dmd2().levels(1)[0].alpha == pytest.approx(0.0683, abs=1e-4)


def test_any_count_gets_an_even_grid_with_the_recipes_own_terminal() -> None:
    recipe = tcd_any()
    assert recipe.grid(4).timesteps == (999.0, 759.0, 499.0, 259.0)  # listed: as it was trained
    assert recipe.grid().timesteps == (999.0, 832.0, 666.0, 499.0, 332.0, 166.0)
    assert recipe.levels(2)[-1].sigma == Vp().sigma_of_timestep(0.0)
    for count in (0, -1):
        with pytest.raises(RecipeError, match=f"not made for {count} steps"):
            recipe.grid(count)
    with pytest.raises(RecipeError, match="1001 steps do not fit into 1000 timesteps"):
        recipe.grid(1001)


def test_even_grids_are_shifted_once_and_assign_experts_by_sigma() -> None:
    recipe = dataclasses.replace(wan_two_experts(), steps="any")
    grid = recipe.grid(8)
    assert grid.timesteps == pytest.approx(
        (1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67), abs=0.01
    )
    assert grid.experts == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_step_at_the_boundary_belongs_to_the_noisier_expert() -> None:
    """As diffusers' WanPipeline: `t >= boundary_ratio * 1000` is the high-noise transformer."""
    recipe = dataclasses.replace(
        wan_two_experts(),
        grids=(Grid(timesteps=(875.0, 625.0), sigmas=(0.875, 0.625, 0.0), experts=(0, 1)),),
        default_steps=2,
    )
    assert recipe.grid().experts == (0, 1)


def test_network_evaluations_count_guidance_twice() -> None:
    assert sdxl_dmd2().nfe() == 4
    assert wan_two_experts().nfe() == 8
    assert sana_sprint().nfe() == 2
    off = Guidance(mode="true_cfg", scale=1.0)
    assert dataclasses.replace(wan_two_experts(), guidance=off).nfe() == 4


def test_a_grid_may_start_below_full_noise() -> None:
    recipe = dataclasses.replace(sdxl_dmd2(), grids=(vp_grid(399.0),), default_steps=1)
    assert recipe.levels()[0].timestep == 399.0


def test_clocks_that_a_model_rounds_are_accepted() -> None:
    """CausVid-like integer timesteps beside exact sigmas: less than a thousandth of the clock."""
    grid = Grid(timesteps=(1000, 937, 833, 625), sigmas=(1.0, 0.9375, 0.83333, 0.625, 0.0))
    recipe = dataclasses.replace(wan_two_experts(), experts=(), grids=(grid,))
    assert recipe.levels()[1].timestep == 937.0


# --- one sentence per broken rule -------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def put(path: str, value: Any) -> Change:
    """A change to parsed JSON: `put("grids.1.sigmas", [...])`."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        target: Any = data
        for key in parents:
            target = target[key]
        target[last] = value

    return change


def drop(path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        parent, _, last = path.rpartition(".")
        del (data[parent] if parent else data)[last]

    return change


def complaint(make: Callable[[], FewStepRecipe], *changes: Change) -> str:
    """What reading the changed recipe says."""
    data = copy.deepcopy(json.loads(make().to_json()))
    for change in changes:
        change(data)
    with pytest.raises(RecipeError) as caught:
        FewStepRecipe.from_json(json.dumps(data))
    return str(caught.value)


RULES: list[tuple[Callable[[], FewStepRecipe], str, Any, str]] = [
    # unknown keys, at any depth
    (sdxl_dmd2, "stepz", 1, "unknown key stepz; known keys: base, grids, default_steps, steps,"),
    (sdxl_dmd2, "sampler.gamma", 1, "unknown key sampler.gamma; known keys: kind, stochasticity"),
    (sdxl_dmd2, "base.schedule.beta", 1, "unknown key base.schedule.beta; known keys: kind,"),
    (sdxl_dmd2, "grids.1.sigma", 1, "unknown key grids[1].sigma; known keys: timesteps, sigmas"),
    (wan_two_experts, "experts.0.name", "a", "unknown key experts[0].name; known keys: adapter,"),
    # wrong types
    (sdxl_dmd2, "default_steps", "4", "default_steps must be an integer, got '4'"),
    (sdxl_dmd2, "default_steps", True, "default_steps must be an integer, got True"),
    (sdxl_dmd2, "default_steps", 4.0, "default_steps must be an integer, got 4.0"),
    (sdxl_dmd2, "default_steps", None, "default_steps must be an integer, got None"),
    (sdxl_dmd2, "base.family", 15, "base.family must be a string, got 15"),
    (sdxl_dmd2, "base", "sdxl", "base must be an object, got 'sdxl'"),
    (sdxl_dmd2, "grids", {}, "grids must be a list, got {}"),
    (sdxl_dmd2, "grids.0", 4, "grids[0] must be an object, got 4"),
    (sdxl_dmd2, "grids.1.sigmas.2", "0.5", "grids[1].sigmas[2] must be a number, got '0.5'"),
    (sdxl_dmd2, "sampler.stochasticity", True, "sampler.stochasticity must be a number, got True"),
    (sdxl_dmd2, "sampler.kind", "lcm", "sampler.kind must be one of step, flow_map, policy; got"),
    (sdxl_dmd2, "steps", 1, "steps must be one of strict, any; got 1"),
    (sdxl_dmd2, "provenance.scores", {"frechet": "low"}, "provenance.scores.frechet must be a num"),
    (wan_two_experts, "grids.0.experts.0", True, "grids[0].experts[0] must be an integer, got Tr"),
    # numbers that are none
    (sdxl_dmd2, "guidance.scale", math.nan, "guidance.scale must be a finite number, got nan"),
    (sdxl_dmd2, "grids.1.sigmas.0", math.inf, "grids[1].sigmas[0] must be a finite number, got"),
    (sdxl_dmd2, "lora.scale", 10**400, "lora.scale must be a finite number, got inf"),
    # grids
    (sdxl_dmd2, "grids", [], "grids is empty; list at least one step count"),
    (sdxl_dmd2, "grids.0", {"timesteps": [], "sigmas": [0]}, "a grid has no timesteps; give at"),
    (
        sdxl_dmd2,
        "grids.1.sigmas",
        [0.9976672, 0.9712757, 0.8499002, 0.5697083],
        "the 4-step grid has 4 sigmas; wanted 5, the last being the terminal (0 for clean",
    ),
    (
        wan_two_experts,
        "grids.0",
        {"timesteps": [1000, 937.5, 833.3], "sigmas": [1, 0.9375, 0.8333, 0.625]},
        "the 3-step grid ends at sigma 0.625; append the terminal, 0 for clean data",
    ),
    (
        sdxl_dmd2,
        "grids.1.sigmas",
        [0.5697083, 0.8499002, 0.9712757, 0.9976672, 0],
        "the 4-step grid has sigmas that do not fall strictly: [0.5697083, 0.8499002,",
    ),
    (
        wan_two_experts,
        "grids.0.timesteps",
        [1000, 937.5, 937.5, 625],
        "the 4-step grid has timesteps that do not fall strictly: [1000.0, 937.5, 937.5,",
    ),
    (
        wan_two_experts,
        "grids.0.sigmas.4",
        -0.01,
        "the 4-step grid has a negative value in sigmas: [1.0,",
    ),
    (
        sdxl_dmd2,
        "grids.1.sigmas",
        [14.61, 4.08, 1.61, 0.69, 0],
        "the 4-step grid starts at sigma 14.61; wanted at most 1 (x = alpha*x0 + sigma*eps; a"
        " Karras sigma s is s / sqrt(1 + s^2) here)",
    ),
    (
        sdxl_dmd2,
        "grids.0",
        {"timesteps": [249], "sigmas": [0.6933, 0]},  # a Karras sigma below 1
        "the 1-step grid pairs timestep 249 with sigma 0.6933, but the schedule says 0.569",
    ),
    (
        wan_two_experts,
        "grids.0.sigmas",
        [1, 0.98684, 0.96154, 0.89286, 0],  # 5u / (1 + 4u) of sigmas that were shifted already
        "the 4-step grid pairs timestep 937.5 with sigma 0.98684, but the schedule says 0.937",
    ),
    (
        sana_sprint,
        "grids.0.timesteps.1",
        1.0,
        "the 2-step grid pairs timestep 1 with sigma 0.963558, but the schedule says 0.841471;",
    ),
    (
        sdxl_dmd2,
        "grids.0.sigmas.0",
        1.0,  # beyond the table, whose last entry is 0.99767
        "the 1-step grid pairs timestep 999 with sigma 1, but the schedule says 0.997667;",
    ),
    (
        sdxl_dmd2,
        "grids.1.timesteps",
        [999, 749, 500, 250],  # ComfyUI's sgm_uniform
        "the 4-step grid pairs timestep 500 with sigma 0.8499, but the schedule says 0.8506",
    ),
    (
        sdxl_dmd2,
        "grids.0",
        {"timesteps": [1000], "sigmas": [0.9977, 0]},
        "the 1-step grid: timestep 1000 is outside this schedule; use 0 to 999",
    ),
    (
        wan_two_experts,
        "base.prediction",
        "epsilon",
        "the 4-step grid starts at sigma 1, where an epsilon prediction does not give x0;",
    ),
    # step counts
    (sdxl_dmd2, "default_steps", 8, "default_steps is 8, but the grids have [1, 4] steps; name"),
    (tcd_any, "default_steps", 0, "default_steps is 0, but the grids have [4] steps; name"),
    # experts
    (
        wan_two_experts,
        "experts.1.sigma_high",
        0.9,
        "experts 'high_noise' and 'low_noise' overlap: one ends at sigma 0.875, the next starts at",
    ),
    (
        wan_two_experts,
        "experts.1.sigma_high",
        0.8,
        "experts 'high_noise' and 'low_noise' leave a gap: one ends at sigma 0.875, the next star",
    ),
    (
        wan_two_experts,
        "experts.1.sigma_low",
        0.1,
        "experts cover sigma 1 to 0.1; they must cover 1 to 0",
    ),
    (
        wan_two_experts,
        "experts.0.sigma_high",
        0.99,
        "experts cover sigma 0.99 to 0; they must cover 1 to 0",
    ),
    (
        wan_two_experts,
        "experts.0.sigma_low",
        1.0,
        "expert 'high_noise' covers sigma 1 to 1; sigma_low must be below sigma_high",
    ),
    (
        wan_two_experts,
        "experts",
        [
            {"adapter": "low", "sigma_high": 0.875, "sigma_low": 0},
            {"adapter": "high", "sigma_high": 1, "sigma_low": 0.875},
        ],
        "experts must be listed highest noise first; got sigma_high [0.875, 1.0]",
    ),
    (
        wan_two_experts,
        "grids.0.experts",
        [0, 1, 1, 1],
        "the 4-step grid gives step 1 (sigma 0.9375) to expert 1, but the sigma intervals say",
    ),
    (
        wan_two_experts,
        "grids.0.experts",
        [0, 0, 1],
        "the 4-step grid assigns 3 steps to experts; wanted 4",
    ),
    (
        wan_two_experts,
        "grids.0.experts",
        [],
        "the 4-step grid assigns 0 steps to experts; wanted 4",
    ),
    (
        sdxl_dmd2,
        "grids.0.experts",
        [0],
        "the 1-step grid assigns 1 steps to experts; wanted 0, as there are no experts",
    ),
    # guidance, sampler, base
    (sdxl_dmd2, "guidance.scale", 7.5, "guidance.mode is none but guidance.scale is 7.5; write sc"),
    (sdxl_dmd2, "guidance.scale", 0, "guidance.mode is none but guidance.scale is 0; write scale"),
    (
        sana_sprint,
        "guidance.negative_prompt",
        "works",
        "guidance.negative_prompt cannot work with mode 'embedded'; write inert",
    ),
    (sdxl_dmd2, "sampler.stochasticity", 1.5, "sampler.stochasticity must be 0 to 1, got 1.5; 0"),
    (sdxl_dmd2, "base.prediction", "flow", "base.prediction 'flow' does not go with a schedule of"),
    (wan_two_experts, "base.prediction", "v", "base.prediction 'v' does not go with a schedule of"),
    (sdxl_dmd2, "base.schedule.shift", 3, "base.schedule of kind 'vp' does not take shift"),
    (sdxl_dmd2, "base.schedule.beta_end", None, "base.schedule of kind 'vp' needs beta_end"),
    (sdxl_dmd2, "base.schedule.beta_end", 1, "base.schedule needs beta_start <= beta_end < 1, got"),
    (wan_two_experts, "base.schedule.shift", 0, "base.schedule.shift must be above 0, got 0"),
    (
        wan_two_experts,
        "base.schedule.num_train_timesteps",
        0,
        "base.schedule.num_train_timesteps must be >= 1, got 0",
    ),
    (wan_two_experts, "base.max_sequence_length", 0, "base.max_sequence_length must be >= 1, got"),
    (
        wan_two_experts,
        "resolution_shift.max_tokens",
        256,
        "resolution_shift needs 0 < base_tokens < max_tokens, got 256 and 256",
    ),
    (
        sdxl_dmd2,
        "resolution_shift",
        {"base_shift": 0.5, "max_shift": 1.15, "base_tokens": 256, "max_tokens": 4096},
        "resolution_shift needs a flow schedule, got kind 'vp'; leave it out",
    ),
    # format
    (sdxl_dmd2, "format", 1, 'format must be "fewstep.recipe/1", got 1'),
    (sdxl_dmd2, "format", "fewstep.recipe", 'format must be "fewstep.recipe/1", got \'fewstep.rec'),
    (sdxl_dmd2, "format", "fewstep.recipe/0", 'format must be "fewstep.recipe/1", got'),
    (sdxl_dmd2, "format", "other.recipe/1", 'format must be "fewstep.recipe/1", got'),
]


@pytest.mark.parametrize(("make", "path", "value", "expected"), RULES)
def test_a_broken_rule_is_one_clear_sentence(
    make: Callable[[], FewStepRecipe], path: str, value: Any, expected: str
) -> None:
    said = complaint(make, put(path, value))
    assert said.startswith(expected)
    assert "\n" not in said
    assert "Traceback" not in said
    assert ". " not in said  # one sentence; the remedy follows a semicolon or colon
    assert len(said) < 250


def test_a_step_count_is_listed_once_and_in_order() -> None:
    grids = json.loads(sdxl_dmd2().to_json())["grids"]
    twice = complaint(sdxl_dmd2, put("grids", [*grids, grids[1]]))
    assert twice == "grids must be in order of step count, each once; got [1, 4, 4]"
    reversed_ = complaint(sdxl_dmd2, put("grids", grids[::-1]))
    assert reversed_ == "grids must be in order of step count, each once; got [4, 1]"


def test_a_missing_key_is_named() -> None:
    assert complaint(sdxl_dmd2, drop("default_steps")).startswith("default_steps is missing;")
    assert complaint(sdxl_dmd2, drop("base.family")).startswith("base.family is missing;")
    assert complaint(sdxl_dmd2, drop("format")).startswith('the recipe has no "format" key;')


def test_an_expert_that_serves_no_step_is_named() -> None:
    low_only = {"timesteps": [833.3333], "sigmas": [0.8333333, 0], "experts": [1]}
    said = complaint(wan_two_experts, put("grids", [low_only]), put("default_steps", 1))
    assert said == "expert 'high_noise' serves no step of any grid; leave it out or add a step"


@pytest.mark.parametrize("text", ["fewstep.recipe/2", "fewstep.recipe/10", "fewstep.recipe/2.1"])
def test_a_newer_format_asks_for_an_upgrade_whatever_else_it_holds(text: str) -> None:
    with pytest.raises(RecipeVersionError) as caught:
        FewStepRecipe.from_json(json.dumps({"format": text, "novelty": [1, 2]}))
    assert str(caught.value) == (
        f"this recipe has format {text}, this fewstep reads up to fewstep.recipe/1; "
        "upgrade with: pip install -U fewstep"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the recipe is not valid JSON: "),
        ("{'format': 1}", "the recipe is not valid JSON: "),
        ("[" * 100_000, "the recipe is not valid JSON: "),
        ('{"format": ' + "9" * 5000 + "}", "the recipe is not valid JSON: "),
        ("[]", 'the recipe has no "format" key; expected "fewstep.recipe/1"'),
        ('{"format": "a", "format": "b"}', "key 'format' appears twice in one object; keep one"),
    ],
)
def test_text_that_is_no_recipe(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        FewStepRecipe.from_json(text)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


# --- recipes made in Python obey the same rules -----------------------------------------------


def test_a_recipe_made_in_python_is_checked_like_one_that_is_read() -> None:
    with pytest.raises(RecipeError, match=r"sigmas\[0\] must be a finite number, got nan"):
        Grid(timesteps=(999.0,), sigmas=(math.nan, 0.0))
    with pytest.raises(RecipeError, match="stochasticity must be a number, got True"):
        Sampler(stochasticity=True)
    wrong: Any = [999.0]
    with pytest.raises(RecipeError, match="timesteps must hold tuples"):
        Grid(timesteps=wrong, sigmas=(0.9977, 0.0))
    kind: Any = "ddpm"
    with pytest.raises(RecipeError, match="schedule.kind must be one of vp, flow, trigflow; got"):
        Schedule(kind=kind)
    single: Any = np.float32(0.9977)  # would not survive JSON
    with pytest.raises(RecipeError, match=r"sigmas\[0\] must be a number, got"):
        Grid(timesteps=(999.0,), sigmas=(single, 0.0))


@pytest.mark.parametrize("make", ALL_RECIPES)
def test_a_recipe_cannot_be_changed(make: Callable[[], FewStepRecipe]) -> None:
    recipe: Any = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.default_steps = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.base.family = "other"


# --- strict_json, which configs use too -------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Every kind of field that strict_json understands."""

    path: Path
    flag: bool = False
    names: tuple[str, ...] = ()
    scores: dict[str, float] | None = None


def test_strict_json_reads_paths_booleans_and_dicts() -> None:
    data = {"path": "a/b", "flag": True, "names": ["x"], "scores": {"k": 2}}
    holder = strict_json.read(Holder, data, error=ValueError)
    assert holder == Holder(path=Path("a/b"), flag=True, names=("x",), scores={"k": 2.0})
    strict_json.check(holder, error=ValueError)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": 1}, "path must be a path, got 1"),
        ({"path": "a", "flag": 1}, "flag must be a boolean, got 1"),
        ({"path": "a", "flag": "true"}, "flag must be a boolean, got 'true'"),
        ({"path": "a", "names": "x"}, "names must be a list, got 'x'"),
        ({"path": "a", "scores": [1]}, r"scores must be an object, got \[1\]"),
        ([], r"Holder must be an object, got \[\]"),
    ],
)
def test_strict_json_names_the_field(data: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        strict_json.read(Holder, data, error=ValueError)
