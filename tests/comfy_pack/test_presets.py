"""Presets of the recipe node: which there are, and that a workflow finds its own again."""

import dataclasses

import pytest

from fewstep.comfy_nodes import preset_list
from fewstep.comfy_nodes.presets import CHOICES, CUSTOM, find_preset, find_presets, why_not
from fewstep.comfy_nodes.recipe_limits import FAMILIES, beyond_comfyui
from fewstep.errors import RecipeError
from fewstep.zoo import entries, entry

ALL = find_presets()


def test_the_list_is_the_zoos() -> None:
    """If not: python -m fewstep.comfy_nodes.presets"""
    assert list(preset_list.PRESETS) == [each.label for each in ALL]
    assert CHOICES == [CUSTOM, *preset_list.PRESETS]
    assert len(set(CHOICES)) == len(CHOICES)


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.label)
def test_every_preset_is_its_authors_word_and_can_be_sampled(each) -> None:
    found = each.entry
    assert found.verification in ("authors", "card", "docs")
    repos = {f"https://huggingface.co/{file.repo}" for file in found.files}
    assert any(source in repos for source in found.sources), "no page of the authors'"
    assert found.family in FAMILIES
    assert beyond_comfyui(each.recipe) is None
    assert find_preset(each.label) == each


def test_a_workflow_finds_its_preset_whatever_the_words_before_its_name() -> None:
    ours = find_preset("SDXL · dmd2-sdxl-4step-lora")
    for choice in ("Stable Diffusion XL · dmd2-sdxl-4step-lora", "dmd2-sdxl-4step-lora"):
        assert find_preset(choice) == ours
    assert ours.recipe.grid().timesteps == (999.0, 749.0, 499.0, 249.0)


def test_a_recipe_of_two_stages_is_two_presets() -> None:
    first, second = (find_preset(f"ltxv-0.9.8-distilled stage {n}") for n in (1, 2))
    whole = entry("ltxv-0.9.8-distilled").recipe
    assert whole is not None
    assert whole.second_stage is not None
    assert first.recipe.grids == whole.grids
    assert second.recipe.grids == (whole.second_stage.grid,)
    assert (first.recipe.second_stage, second.recipe.second_stage) == (None, None)
    assert second.title.endswith(", stage 2")
    assert find_preset("ltxv-0.9.8-distilled") == first
    with pytest.raises(RecipeError, match="has no stage 3; choose"):
        find_preset("ltxv-0.9.8-distilled stage 3")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hyper-flux1-dev-8steps-lora", "told by third parties only"),
        ("sd-turbo", "written from memory"),
        ("animatelcm", "does not load motion module files"),
        ("sana-sprint-0.6b", "knows no sana-sprint model"),
        ("swd-sdxl", "a ComfyUI latent keeps its size"),
        ("lcm-sdxl", "told the guidance scale"),
        ("pi-flux1-4step", "does not load policy files"),
    ],
)
def test_what_is_no_preset_says_why(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"is no preset: .*{reason}.*; see https://"):
        find_preset(f"X · {name}")


def test_a_misspelt_preset_names_similar_ones() -> None:
    with pytest.raises(RecipeError, match="did you mean dmd2-sdxl-4step-lora"):
        find_preset("SDXL · dmd2-sdxl-4steps-lora")


def test_no_entry_is_left_out_without_a_reason() -> None:
    names = {each.entry.name for each in ALL}
    for found in entries():
        assert (found.name in names) == (why_not(found) is None)


def test_a_preset_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL[0].stage = 3  # pyright: ignore[reportAttributeAccessIssue]
