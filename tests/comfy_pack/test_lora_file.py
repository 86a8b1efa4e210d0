"""An adapter file before any MODEL is looked at: its recipe, its kind, its phase."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.comfy_nodes.lora_file import component_for, fingerprint, open_lora, phases_in
from fewstep.errors import AdapterError, RecipeNotFoundError, RecipeVersionError
from fewstep.recipe import METADATA_KEY, Expert, FewStepRecipe
from tests.tiny.recipes import flow_recipe

RECIPE = flow_recipe("sd3")
NAME = "transformer_blocks.0.attn.to_q"


def with_experts(*components: str | None) -> FewStepRecipe:
    """The recipe with two experts, of these components."""
    places = components or (None, None)
    grid = RECIPE.grids[0]
    experts = (
        Expert(adapter="high_noise", sigma_high=1.0, sigma_low=0.7, component=places[0]),
        Expert(adapter="low_noise", sigma_high=0.7, sigma_low=0.0, component=places[1]),
    )
    chosen = tuple(0 if sigma >= 0.7 else 1 for sigma in grid.sigmas[:-1])
    return replace(RECIPE, experts=experts, grids=(replace(grid, experts=chosen),))


def lora(
    path: Path, recipe: FewStepRecipe | str | None = RECIPE, *prefixes: str, **metadata: str
) -> Path:
    """A file with one layer under each prefix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for prefix in prefixes or ("transformer.",):
        tensors[f"{prefix}{NAME}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"{prefix}{NAME}.lora_B.weight"] = torch.ones(8, 2)
    if recipe is not None:
        text = recipe if isinstance(recipe, str) else recipe.to_json()
        metadata = {**metadata, METADATA_KEY: text}
    save_file(tensors, path, metadata=metadata)
    return path


def test_the_files_own_recipe_and_title(tmp_path: Path) -> None:
    file = open_lora(lora(tmp_path / "a.safetensors", **{"modelspec.title": "Fast"}))
    assert (file.recipe, file.title, file.note, file.name) == (RECIPE, "Fast", "", "a.safetensors")


def test_a_file_the_zoo_knows_gets_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "tianweiy" / "DMD2" / "dmd2_sdxl_4step_lora.safetensors"
    file = open_lora(lora(path, None, "unet."))
    assert file.recipe.base.family == "sdxl"
    assert file.recipe.default_steps == 4
    assert file.note.startswith("The file has no recipe; the zoo's for ")


def test_a_file_nobody_knows_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeNotFoundError, match=r"'x\.safetensors' has no few-step recipe\. Use"):
        open_lora(lora(tmp_path / "x.safetensors", None))


def test_a_newer_recipe_asks_for_a_newer_pack(tmp_path: Path) -> None:
    text = json.dumps({**json.loads(RECIPE.to_json()), "format": "fewstep.recipe/2"})
    with pytest.raises(RecipeVersionError) as error:
        open_lora(lora(tmp_path / "x.safetensors", text))
    assert str(error.value) == (
        "Recipe needs ComfyUI nodes format 2, this pack reads 1. Update the Few-Step pack."
    )


def test_a_whole_model_is_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"{NAME}.weight": torch.ones(8, 8), "proj.bias": torch.ones(8)}, path)
    with pytest.raises(AdapterError, match="is a whole model, not a LoRA"):
        open_lora(path)


def test_rotations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "turned.safetensors"
    tensors = {f"unet.{NAME}.lorad_A.weight": torch.ones(8, 2)}
    save_file({**tensors, f"unet.{NAME}.lorad_B.weight": torch.ones(2, 4)}, path)
    with pytest.raises(AdapterError, match=r"is LoRaD .*, which ComfyUI cannot apply"):
        open_lora(path)


@pytest.mark.parametrize(
    ("name", "metadata", "phase"),
    [
        ("run-low_noise.safetensors", {}, 1),
        ("Wan2.2-HIGH.safetensors", {}, 0),
        ("a.safetensors", {"fewstep.phase": "low_noise"}, 1),
        ("run-low_noise.safetensors", {"fewstep.phase": "high_noise"}, 0),
    ],
)
def test_the_file_tells_its_phase(
    tmp_path: Path, name: str, metadata: dict[str, str], phase: int
) -> None:
    file = open_lora(lora(tmp_path / name, with_experts(), **metadata))
    assert phases_in(file) == (phase,)
    assert phases_in(file, 1) == (1,)


def test_a_phase_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    file = open_lora(lora(tmp_path / "a.safetensors", with_experts()))
    with pytest.raises(AdapterError, match="Choose it in expert: 1 high_noise, 2 low_noise"):
        phases_in(file)
    with pytest.raises(AdapterError, match="expert is 3, but the recipe of 'a.safetensors' has 2"):
        phases_in(file, 2)


def test_a_file_of_two_networks_is_one_of_them_per_model(tmp_path: Path) -> None:
    recipe = with_experts("transformer", "transformer_2")
    both = ("transformer.", "transformer_2.")
    file = open_lora(lora(tmp_path / "a.safetensors", recipe, *both))
    with pytest.raises(AdapterError, match="holds weights for two networks. Choose in expert"):
        phases_in(file)
    assert component_for(file, phases_in(file, 1)[0]) == "transformer_2"


def test_a_file_of_two_experts_over_one_base_has_both(tmp_path: Path) -> None:
    both = ("transformer.", "transformer_2.")
    file = open_lora(lora(tmp_path / "a.safetensors", with_experts(), *both))
    assert phases_in(file) == (0, 1)
    assert [component_for(file, phase) for phase in (0, 1)] == ["transformer", "transformer_2"]


def test_a_recipe_without_experts_has_no_phases(tmp_path: Path) -> None:
    file = open_lora(lora(tmp_path / "a.safetensors"))
    assert phases_in(file) == ()
    assert component_for(file, None) == "transformer"


def test_the_fingerprint_is_of_name_time_and_size(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    before = fingerprint(path)
    assert before == fingerprint(path)
    lora(path, RECIPE, "transformer.", "transformer_2.")
    assert fingerprint(path) != before
