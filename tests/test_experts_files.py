"""One call loads all experts: which file is which, and the sentences where that is unclear."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fewstep.adapters import read_header
from fewstep.errors import AdapterError, PipelineError, RecipeNotFoundError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.experts.files import find_files
from fewstep.recipe import SIDECAR_NAME
from tests.expert_files import (
    HIGH,
    LOW,
    draw,
    draw_by_hand,
    expert_file,
    expert_folder,
    expert_recipe,
)
from tests.tiny_pipelines import SD3, WAN22


def names_of(pipe: Any) -> list[tuple[str, str, str]]:
    return [(a.name, a.path.name, a.component) for a in pipe.adapters]


def test_a_folder_is_one_call(tmp_path: Path) -> None:
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    pipe = FewStepPipeline.wrap(WAN22.build(), adapter=folder)
    assert names_of(pipe) == [
        ("fewstep_high_noise", "high_noise_model.safetensors", "transformer"),
        ("fewstep_low_noise", "low_noise_model.safetensors", "transformer_2"),
    ]


def test_from_pretrained_takes_base_and_folder(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path / "experts")
    SD3.build().save_pretrained(tmp_path / "base")
    pipe = FewStepPipeline.from_pretrained(tmp_path / "base", adapter=folder, experts="fused")
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3)
    torch.testing.assert_close(draw(pipe, SD3), expected, rtol=1e-4, atol=1e-4)


def test_a_mapping_says_which_file_is_which(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3)
    for name, other in ((HIGH, "a"), (LOW, "b")):  # names that say nothing
        shutil.copy(folder / f"{name}_model.safetensors", tmp_path / f"{other}.safetensors")
    files = {LOW: tmp_path / "b.safetensors", HIGH: str(tmp_path / "a.safetensors")}
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=files, recipe=recipe)
    assert torch.equal(draw(pipe, SD3), expected)


def test_metadata_beats_the_files_name_and_is_written_by_save_adapter(tmp_path: Path) -> None:
    recipe = expert_recipe(SD3)
    low = expert_file(SD3, tmp_path / "high.safetensors", seed=2, recipe=recipe, phase=LOW)
    high = expert_file(SD3, tmp_path / "low.safetensors", seed=1, recipe=recipe, phase=HIGH)
    assert read_header(low).metadata["fewstep.phase"] == LOW
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=tmp_path)
    assert [a.path for a in pipe.adapters] == [high, low]


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_one_file_may_hold_both_networks(policy: str, tmp_path: Path) -> None:
    folder, recipe = expert_folder(WAN22, tmp_path / "experts", own_networks=True)
    expected = draw(FewStepPipeline.wrap(WAN22.build(), adapter=folder), WAN22)
    both = safetensors.torch.load_file(folder / "high_noise_model.safetensors")
    for name, value in safetensors.torch.load_file(folder / "low_noise_model.safetensors").items():
        both[name.replace("transformer.", "transformer_2.", 1)] = value
    file = tmp_path / "both.safetensors"
    safetensors.torch.save_file(both, file)
    pipe = FewStepPipeline.wrap(WAN22.build(), adapter=file, recipe=recipe, experts=policy)
    torch.testing.assert_close(draw(pipe, WAN22), expected, rtol=1e-4, atol=1e-4)
    assert [a.component for a in pipe.adapters] == ["transformer", "transformer_2"]


def test_a_file_for_the_second_network_may_name_it_itself(tmp_path: Path) -> None:
    recipe = expert_recipe(WAN22, own_networks=True)
    expert_file(WAN22, tmp_path / "a_high.safetensors", seed=1, recipe=recipe)
    expert_file(WAN22, tmp_path / "b.safetensors", seed=2, recipe=recipe, component="transformer_2")
    pipe = FewStepPipeline.wrap(WAN22.build(), adapter=tmp_path)
    assert [a.path.name for a in pipe.adapters] == ["a_high.safetensors", "b.safetensors"]


def test_the_recipe_may_lie_beside_the_files(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    for file in folder.glob("*.safetensors"):
        safetensors.torch.save_file(safetensors.torch.load_file(file), file)  # drops the metadata
    with pytest.raises(RecipeNotFoundError, match="pass recipe="):
        FewStepPipeline.wrap(SD3.build(), adapter=folder)
    (folder / SIDECAR_NAME).write_text(recipe.to_json())
    assert FewStepPipeline.wrap(SD3.build(), adapter=folder).recipe == recipe


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    (folder / "low_noise_model.safetensors").unlink()
    for adapter in (folder, folder / "high_noise_model.safetensors"):
        with pytest.raises(AdapterError, match="no file for expert 'low_noise' among high_noise_"):
            FewStepPipeline.wrap(SD3.build(), adapter=adapter)


def test_two_files_for_one_expert_are_named(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    expert_file(SD3, folder / "high_noise_v2.safetensors", seed=3, recipe=recipe)
    with pytest.raises(AdapterError, match="model.safetensors and .*v2.safetensors are both for"):
        FewStepPipeline.wrap(SD3.build(), adapter=folder)


def test_a_file_that_nothing_tells_apart_is_named(tmp_path: Path) -> None:
    recipe = expert_recipe(SD3)
    expert_file(SD3, tmp_path / "one.safetensors", seed=1, recipe=recipe)
    expert_file(SD3, tmp_path / "two.safetensors", seed=2, recipe=recipe)
    with pytest.raises(AdapterError, match="one.safetensors: nothing says which expert this is"):
        FewStepPipeline.wrap(SD3.build(), adapter=tmp_path)


def test_unknown_experts_are_named(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    file = folder / "high_noise_model.safetensors"
    with pytest.raises(AdapterError, match="names expert 'hihg', but this recipe's experts are 'h"):
        FewStepPipeline.wrap(SD3.build(), adapter={"hihg": file})
    expert_file(SD3, tmp_path / "mid" / "a.safetensors", seed=1, recipe=recipe, phase="mid_noise")
    with pytest.raises(AdapterError, match="says fewstep.phase is 'mid_noise', but"):
        FewStepPipeline.wrap(SD3.build(), adapter=tmp_path / "mid")


def test_files_with_different_recipes_do_not_belong_together(tmp_path: Path) -> None:
    for name, num_high in ((HIGH, 2), (LOW, 3)):
        recipe = expert_recipe(SD3, num_high=num_high)
        expert_file(SD3, tmp_path / f"{name}.safetensors", seed=1, recipe=recipe)
    with pytest.raises(AdapterError, match="carry different recipes"):
        FewStepPipeline.wrap(SD3.build(), adapter=tmp_path)


def test_several_files_for_a_recipe_without_experts(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    with pytest.raises(AdapterError, match="2 .safetensors files here .* has no experts; name the"):
        FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="adapter names 'high_noise', but this recipe has no ex"):
        FewStepPipeline.wrap(
            SD3.build(),
            adapter={HIGH: folder / "high_noise_model.safetensors"},
            recipe=SD3.recipe(),
        )
    with pytest.raises(AdapterError, match="adapter is an empty mapping"):
        FewStepPipeline.wrap(SD3.build(), adapter={}, recipe=SD3.recipe())


def test_experts_of_one_network_need_their_files() -> None:
    with pytest.raises(
        PipelineError, match="needs the adapters of its experts 'high_noise' and 'l"
    ):
        FewStepPipeline.wrap(SD3.build(), recipe=expert_recipe(SD3))


def test_an_expert_that_does_not_fit_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    low = folder / "low_noise_model.safetensors"
    tensors = safetensors.torch.load_file(low)
    tensors = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, low)
    stock = SD3.build()
    scheduler, keys = (
        stock.components["scheduler"],
        list(stock.components["transformer"].state_dict()),
    )
    for policy in ("adapters", "fused", "hotswap"):
        with pytest.raises(AdapterError, match="low_noise_model.*modules fit this base"):
            FewStepPipeline.wrap(stock, adapter=folder, recipe=recipe, experts=policy)
        assert stock.components["scheduler"] is scheduler
        assert list(stock.components["transformer"].state_dict()) == keys


def test_an_expert_with_text_modules_is_refused(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    high = folder / "high_noise_model.safetensors"
    tensors = safetensors.torch.load_file(high)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{layer}.lora_A.weight": torch.ones(2, 8)}
    tensors |= {f"{layer}.lora_B.weight": torch.ones(8, 2)}
    safetensors.torch.save_file(tensors, high)
    with pytest.raises(
        AdapterError, match="for some of the steps or prompts, but has LoRA modules for text_e"
    ):
        FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=recipe)


def test_hub_names_become_the_files_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a hub cache on disk, made as huggingface_hub lays it out; no network."""
    snapshot = tmp_path / "models--some--experts" / "snapshots" / ("0" * 40)
    expert_folder(SD3, snapshot / "v1")
    refs = tmp_path / "models--some--experts" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    found = find_files("some/experts/v1", options)
    assert [file.header.path.name for file in found] == [
        "high_noise_model.safetensors",
        "low_noise_model.safetensors",
    ]


def test_a_repository_with_many_files_is_not_downloaded_whole(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--loras" / "snapshots" / ("0" * 40)
    for name in ("a", "b", "c"):
        expert_file(SD3, snapshot / f"{name}.safetensors", seed=1)
    refs = tmp_path / "models--some--loras" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(AdapterError, match="some/loras: 3 .safetensors files here .a.safetensors,"):
        find_files("some/loras", options)


def test_a_folder_of_pickles_is_found_as_well(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=recipe), SD3)
    for file in folder.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(file), file.with_suffix(".pt"))
        file.unlink()
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=recipe)
    assert [adapter.path.name for adapter in pipe.adapters] == [
        "high_noise_model.pt",
        "low_noise_model.pt",
    ]
    assert torch.equal(draw(pipe, SD3), expected)


def test_two_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    first, second = recipe.experts
    twins = replace(recipe, experts=(first, replace(second, adapter=first.adapter)))
    with pytest.raises(AdapterError, match="two experts of this recipe are called 'high_noise'"):
        FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=twins)


def test_experts_may_have_any_names(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    first, second = recipe.experts
    named = replace(
        recipe, experts=(replace(first, adapter="sigma 1-0.9"), replace(second, adapter="tail.v2"))
    )
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=named)  # high, then low
    assert [a.name for a in pipe.adapters] == ["fewstep_sigma_1_0_9", "fewstep_tail_v2"]
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder, recipe=recipe), SD3)
    assert torch.equal(draw(pipe, SD3), expected)


def test_wan_22_lightning_is_one_call(tmp_path: Path) -> None:
    """The published repository's layout and names, with a tiny Wan 2.2's sizes; the zoo knows it.

    ComfyUI's names, down and up, one alpha per layer: 8 / 64 in the files, 0.5 / 2 here.
    """
    folder = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    snapshot = tmp_path / "models--lightx2v--Wan2.2-Lightning" / "snapshots" / ("0" * 40)
    (snapshot / folder).mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    deltas: list[dict[str, torch.Tensor]] = []
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        generator = torch.Generator().manual_seed(seed)
        tensors, found = {}, {}
        for native, ours in (("self_attn.q", "attn1.to_q"), ("cross_attn.v", "attn2.to_v")):
            down, up = (torch.randn(*s, generator=generator) for s in ((2, 24), (24, 2)))
            layer = f"diffusion_model.blocks.0.{native}"
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = torch.tensor(0.5)
            found[f"blocks.0.{ours}.weight"] = 0.25 * up @ down
        safetensors.torch.save_file(tensors, snapshot / folder / f"{name}.safetensors")
        deltas.append(found)
    base = WAN22.build()
    base.register_to_config(boundary_ratio=0.5)  # the recipe's counts, not the base's
    base.save_pretrained(tmp_path / "base")
    pipe = FewStepPipeline.from_pretrained(
        tmp_path / "base",
        adapter=f"lightx2v/Wan2.2-Lightning/{folder}",
        cache_dir=str(tmp_path),
        local_files_only=True,
    )
    assert pipe.recipe.grid().experts == (0, 0, 1, 1)
    assert "wan2.2-lightning-t2v-a14b" in pipe.describe()
    steps = [{"transformer": deltas[0]}] * 2 + [{"transformer_2": deltas[1]}] * 2
    expected = draw_by_hand(WAN22, expert_recipe(WAN22, own_networks=True), [[s] for s in steps])
    torch.testing.assert_close(draw(pipe, WAN22), expected, rtol=1e-4, atol=1e-4)
