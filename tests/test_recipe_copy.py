"""Copies of adapters that carry a recipe: tensors byte for byte, and never a file lost."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.adapters import read_header
from fewstep.adapters.expert_tags import PHASE_KEY
from fewstep.adapters.recipe_copy import HINT_KEY, STALE, copy_with_recipe
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe, Lora
from fewstep.zoo import entry
from tests.comfy_pack.lora_files import FLUX_LAYERS, kohya_lora
from tests.tiny.recipes import flow_recipe, vp_recipe

RECIPE = vp_recipe("sdxl")


def wan_recipe() -> FewStepRecipe:
    recipe = entry("wan2.2-lightning-t2v-a14b").recipe
    assert recipe is not None
    return recipe


def test_the_copy_has_the_same_tensors_and_the_recipe(tmp_path: Path) -> None:
    metadata = {"title": "x", STALE: "of the old header"}
    source = kohya_lora(tmp_path / "a.safetensors", metadata=metadata)
    before = source.read_bytes()
    target = tmp_path / "new" / "b.safetensors"
    assert copy_with_recipe(source, target, RECIPE)
    assert source.read_bytes() == before
    old, new = read_header(source), read_header(target)
    assert new.recipe() == RECIPE
    assert new.metadata[HINT_KEY] == "4 steps, guidance off, DDIM; see fewstep.recipe"
    assert (new.metadata["title"], STALE in new.metadata) == ("x", False)
    assert list(new.tensors) == list(old.tensors)
    assert all(torch.equal(v, load_file(source)[k]) for k, v in load_file(target).items())
    assert min(info.offset for info in new.tensors.values()) % 8 == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["b.safetensors"]


def test_another_recipe_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    source = kohya_lora(tmp_path / "a.safetensors")
    first, second = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    copy_with_recipe(source, first, RECIPE)
    copy_with_recipe(first, second, vp_recipe("sdxl", stochasticity=1.0))
    assert read_header(second).recipe() == vp_recipe("sdxl", stochasticity=1.0)
    assert "fresh noise" in read_header(second).metadata[HINT_KEY]


def test_the_same_copy_again_is_nothing_to_do(tmp_path: Path) -> None:
    source, target = kohya_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert copy_with_recipe(source, target, RECIPE)
    written = target.stat().st_mtime_ns
    assert not copy_with_recipe(source, target, RECIPE)
    assert not copy_with_recipe(source, target, RECIPE, overwrite=True)
    assert target.stat().st_mtime_ns == written


def test_another_file_is_only_replaced_on_request(tmp_path: Path) -> None:
    source, target = kohya_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    target.write_bytes(b"somebody's")
    with pytest.raises(AdapterError, match="is there already, with other content"):
        copy_with_recipe(source, target, RECIPE)
    assert target.read_bytes() == b"somebody's"
    assert copy_with_recipe(source, target, RECIPE, overwrite=True)
    assert read_header(target).recipe() == RECIPE
    other = vp_recipe("sdxl", stochasticity=1.0)
    with pytest.raises(AdapterError, match="name another, or allow it"):
        copy_with_recipe(source, target, other)


def test_a_copy_of_the_same_size_with_other_weights_is_another_file(tmp_path: Path) -> None:
    source, target = kohya_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    copy_with_recipe(source, target, RECIPE)
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(AdapterError, match="is there already"):
        copy_with_recipe(source, target, RECIPE)


def test_the_original_is_never_written(tmp_path: Path) -> None:
    source = kohya_lora(tmp_path / "a.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    before = source.read_bytes()
    for target in (source, link):
        with pytest.raises(AdapterError, match="would overwrite the adapter it is made from"):
            copy_with_recipe(source, target, RECIPE, overwrite=True)
    assert source.read_bytes() == before


def test_a_recipe_for_another_family_is_refused(tmp_path: Path) -> None:
    flux = kohya_lora(tmp_path / "a.safetensors", FLUX_LAYERS)
    with pytest.raises(AdapterError, match="look like flux, but the recipe is for sdxl"):
        copy_with_recipe(flux, tmp_path / "b.safetensors", RECIPE)
    assert copy_with_recipe(flux, tmp_path / "b.safetensors", flow_recipe("flux"))
    unheard = tmp_path / "c.safetensors"
    assert copy_with_recipe(flux, unheard, flow_recipe("a-new-family"))


def test_a_phase_known_by_the_name_alone_is_written_down(tmp_path: Path) -> None:
    layers = {"lora_unet_blocks_0_self_attn_q": (16, 16)}
    for expert in ("high_noise", "low_noise"):
        source = kohya_lora(tmp_path / f"wan_{expert}.safetensors", layers)
        target = tmp_path / f"copy-{expert[0]}.safetensors"
        copy_with_recipe(source, target, wan_recipe())
        assert read_header(target).metadata[PHASE_KEY] == expert


def test_a_recipe_does_not_say_that_alpha_is_baked_where_it_is_not(tmp_path: Path) -> None:
    baked = vp_recipe("sdxl", lora=Lora(alpha="baked"))
    for alpha, wanted in ((4.0, "in_file"), (2.0, "baked"), (None, "baked")):
        source = kohya_lora(tmp_path / f"{alpha}.safetensors", alpha=alpha)
        target = tmp_path / f"{alpha}-copy.safetensors"
        copy_with_recipe(source, target, baked)
        recipe = read_header(target).recipe()
        assert recipe is not None
        assert recipe.lora.alpha == wanted


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="holds no adapter to carry a recipe"):
        copy_with_recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RECIPE)
    source = kohya_lora(tmp_path / "c.safetensors")
    with pytest.raises(AdapterError, match=r"end the name in \.safetensors"):
        copy_with_recipe(source, tmp_path / "b.pt", RECIPE)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    source = kohya_lora(tmp_path / "a.safetensors")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(AdapterError, match="cannot be written"):
        copy_with_recipe(source, tmp_path / "taken" / "b.safetensors", RECIPE)


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    source = kohya_lora(tmp_path / "a.safetensors")
    pickle = tmp_path / "a.pt"
    torch.save(load_file(source), pickle)
    assert copy_with_recipe(pickle, tmp_path / "b.safetensors", RECIPE)
    copy = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(values, copy[name]) for name, values in load_file(source).items())
