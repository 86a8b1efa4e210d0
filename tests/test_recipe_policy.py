"""The policy of a recipe: what a host must know to follow one, and what it goes with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fewstep.adapters.modelspec import usage_hint
from fewstep.errors import RecipeError
from fewstep.recipe import (
    FewStepRecipe,
    Guidance,
    ResolutionShift,
    Sampler,
    SolverRow,
    StepPolicy,
    json_schema,
)
from fewstep.zoo import entries
from tests.expert_files import expert_recipe
from tests.policy_files import DX, GM, policy_recipe
from tests.tiny_pipelines import SD3, vp_recipe

POLICIES = pytest.mark.parametrize("policy", [DX, GM], ids=["dx", "gm"])


@POLICIES
def test_json_gives_back_an_equal_policy_and_the_schema_takes_it(policy: StepPolicy) -> None:
    recipe = policy_recipe(SD3, policy)
    text = recipe.to_json()
    assert FewStepRecipe.from_json(text) == recipe
    jsonschema.validate(json.loads(text), json_schema())
    assert json.loads(text)["sampler"]["policy"]["components"] == 3
    assert usage_hint(recipe) == "4 steps, guidance off, policy"


def test_recipes_without_a_policy_are_written_as_before() -> None:
    for recipe in (SD3.recipe(), replace(SD3.recipe(), sampler=Sampler(kind="flow_map"))):
        data = json.loads(recipe.to_json())
        assert list(data["sampler"]) == [
            *("kind", "stochasticity", "noise", "first_noise", "clip_x0", "noise_correction")
        ]


def test_a_policy_goes_with_its_own_kind_alone() -> None:
    with pytest.raises(RecipeError, match="kind 'policy' needs sampler.policy"):
        Sampler(kind="policy")
    for kind in ("step", "flow_map"):
        with pytest.raises(RecipeError, match=f"kind '{kind}' does not take sampler.policy"):
            Sampler(kind=kind, policy=GM)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": 0}, "components of kind 'gm' must be 1 to 1024, got 0"),
        ({"substeps": 0}, "substeps of kind 'gm' must be 1 to 1024, got 0"),
        ({"substeps": 2000}, "substeps of kind 'gm' must be 1 to 1024, got 2000"),
        ({"kind": "dx", "components": 1}, "components of kind 'dx' must be 2 to 1024, got 1"),
        ({"shift": 0.0}, "shift must be above 0, got 0"),
        ({"segment": 0.5}, "of kind 'gm' does not take segment"),
        ({"kind": "dx"}, "of kind 'dx' needs segment"),
        ({"kind": "dx", "segment": 1.5}, "segment must be above 0, up to 1, got 1.5"),
        ({"kind": "dx", "segment": 0.5, "temperature": 0.5}, "does not take temperature"),
        ({"temperature": 0.0}, "temperature must be above 0, up to 1, got 0"),
        ({"kind": "em"}, "sampler.policy.kind must be one of"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(changes: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {"kind": "gm", "components": 3, "shift": 3.2, **changes}
    with pytest.raises(RecipeError, match=said):
        StepPolicy(**values)


def refusal(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        replace(policy_recipe(SD3, GM), **changes)
    return str(caught.value)


def test_what_knows_one_velocity_per_step_does_not_go_with_it() -> None:
    sampler = Sampler(kind="policy", policy=GM)
    for odd in ({"stochasticity": 0.5}, {"clip_x0": 1.0}, {"noise_correction": True}):
        with pytest.raises(RecipeError, match="follows a policy, which is deterministic as it is"):
            replace(sampler, **odd)
    with pytest.raises(RecipeError, match="'policy' needs a flow schedule .* 'epsilon' on kind"):
        vp_recipe("sd15", sampler=sampler)
    guidance = Guidance(mode="cfg", scale=2.0, negative_prompt="works")
    assert "'policy' and guidance.mode 'cfg' cannot be combined" in refusal(guidance=guidance)
    assert "'policy' and steps 'any' cannot be combined" in refusal(steps="any")
    shift = ResolutionShift(
        kind="exponential", base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096
    )
    assert "and resolution_shift cannot be combined" in refusal(resolution_shift=shift)
    with pytest.raises(RecipeError, match="'policy' and experts cannot be combined"):
        replace(expert_recipe(SD3), sampler=sampler)
    grid = SD3.recipe().grids[0]
    for odd_grid in (
        replace(grid, clock=grid.timesteps),
        replace(grid, solver=(SolverRow(sample=0.0, x0=1.0),) * 4),
        replace(grid, sizes=(1.0,) * 4),
    ):
        assert "the network says how a step goes" in refusal(grids=(odd_grid,))


def test_no_step_is_longer_than_what_a_dx_network_tells() -> None:
    """The grid of four steps at shift 5 goes a quarter of the clock in each."""
    policy_recipe(SD3, replace(DX, segment=0.25))
    with pytest.raises(RecipeError, match=r"goes 0.25 of .* in step 0, .* tells 0.2 ahead"):
        policy_recipe(SD3, replace(DX, segment=0.2))
    with pytest.raises(RecipeError, match="in step 3"):  # on another clock the last is the longest
        policy_recipe(SD3, replace(DX, shift=1.0, segment=0.5))


def test_public_policies_are_as_their_authors_say() -> None:
    policies = {
        found.name: found.recipe.sampler.policy
        for found in entries()
        if found.recipe is not None and found.recipe.sampler.policy is not None
    }
    four = StepPolicy(kind="gm", components=8, shift=3.2, temperature=0.3)
    assert policies == {
        "pi-flux1-4step": four,
        "pi-flux1-8step": replace(four, temperature=0.7),
        "pi-flux2": four,
        "pi-qwen-image-4step": four,
        "kandinsky-6.0-pro-distill-5s": StepPolicy(
            kind="dx", components=10, shift=5.0, segment=0.06451612903
        ),
    }


def test_the_published_schema_knows_policies() -> None:
    path = Path(__file__).parents[1] / "docs" / "recipe.schema.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    bad = json.loads(policy_recipe(SD3, GM).to_json())
    bad["sampler"]["policy"]["temprature"] = 0.5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, published)
    with pytest.raises(RecipeError, match="unknown key sampler.policy.temprature"):
        FewStepRecipe.from_json(json.dumps(bad))
