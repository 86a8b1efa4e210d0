"""Recipes and LoRA files in words."""

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.adapters.recipe_copy import copy_with_recipe
from fewstep.comfy_nodes.lora_facts import lora_facts
from fewstep.comfy_nodes.presets import find_preset, find_presets
from fewstep.comfy_nodes.recipe_text import details, summary, table
from fewstep.recipe import Provenance
from fewstep.zoo import entry
from tests.comfy_pack.lora_files import kohya_lora
from tests.tiny.recipes import flow_recipe, vp_recipe


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dmd2-sdxl-4step-lora", "DMD2 · 4 steps · re-noise · guidance 1.0 · base SDXL"),
        ("flux1-schnell", "LADD · 4 steps (or 1, 2, 3) · Euler · guidance 1.0 · base Flux"),
        (
            "tcd-sdxl-lora",
            "TCD · 4 steps (12 counts from 2 to 50) · TCD gamma 0.3 · guidance 1.0 · base SDXL",
        ),
        ("fasthunyuan", "PCM · 6 steps · Euler · embedded guidance 6.0 · base HunyuanVideo"),
        ("pcm-sdxl-normalcfg-4step", "PCM · 4 steps · DDIM · guidance 7.5 · base SDXL"),
        (
            "perflow-sd15-dreamshaper",
            "PeRFlow · 8 steps (5 counts from 4 to 8) · fitted solver · guidance 7.5 · base SD 1.5",
        ),
    ],
)
def test_a_recipe_is_one_line(name: str, line: str) -> None:
    preset = find_preset(name)
    assert summary(preset.recipe, preset.title) == line


def test_a_recipe_that_does_not_say_how_it_was_made_goes_by_its_name() -> None:
    recipe = vp_recipe("sd15", steps="any")
    line = "my-lora · 4 steps (any count) · DDIM · guidance 1.0 · base SD 1.5"
    assert summary(recipe, "folder/my-lora.safetensors") == line
    trained = replace(recipe, provenance=Provenance(objective="DMD2, 2000 steps"))
    assert summary(trained, "x").startswith("DMD2 · 4 steps")


def test_the_long_text_says_everything() -> None:
    text = details(find_preset("wan2.2-lightning-t2v-a14b").recipe, "lightning")
    assert "timesteps 1000, 937.5, 833.333, 625" in text
    assert "sigmas    1, 0.9375, 0.833333, 0.625, 0" in text
    assert "high_noise: step 1, 2, sigma 1 to 0.875, a network of its own (transformer)" in text
    assert "low_noise: step 3, 4" in text
    assert "source    https://huggingface.co/lightx2v/Wan2.2-Lightning" in text


def test_it_tells_the_sigmas_of_the_model_at_hand() -> None:
    recipe = find_preset("dmd2-sdxl-4step-lora").recipe
    text = details(recipe, "x", model_sigmas=(14.6146, 4.08, 1.61, 0.69, 0.0))
    assert "in MODEL  14.6146, 4.08, 1.61, 0.69, 0\n" in text
    assert "fresh noise at every step" in text
    assert "starts from noise of deviation 1)" in text


def test_the_scale_of_a_lora_is_told() -> None:
    recipe = find_preset("hyper-sd3-8steps-cfg-lora").recipe
    assert "core's LoRA loader needs this strength_model" in details(recipe, "x")
    assert "strength" not in details(flow_recipe("wan"), "x")


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("swd-sdxl", "cannot sample this recipe: its samples grow"),
        ("sana-sprint-0.6b", "ComfyUI has no model with a TrigFlow schedule"),
        ("pi-flux1-4step", "its network returns a policy"),
        ("anyflow-wan2.1-1.3b", "told the time a step ends at"),
        ("ltxv-0.9.8-distilled", "it has a second stage"),
        ("sdxl-lightning-1step-unet-x0", 'put "ModelSamplingDiscrete" with "x0"'),
    ],
)
def test_what_comfyui_cannot_do_is_a_warning(name: str, warning: str) -> None:
    recipe = entry(name).recipe
    assert recipe is not None
    assert warning in details(recipe, name)


@pytest.mark.parametrize("preset", find_presets(), ids=lambda each: each.label)
def test_every_preset_can_be_told(preset) -> None:
    text = details(preset.recipe, preset.title)
    assert all(len(line) > 10 and line.isprintable() for line in text.splitlines())
    assert "ComfyUI cannot" not in text


def test_text_out_of_a_file_cannot_play_tricks() -> None:
    recipe = vp_recipe("sd15", provenance=Provenance(objective="a\x1b[31mb", licence="x\ny"))
    assert summary(recipe, "x").startswith("a?[31mb · ")
    assert "licence   x?y\n" in details(recipe, "x") + "\n"
    assert table([("a", "b\rc")]) == "a         b?c"


def test_a_lora_without_a_recipe_says_so(tmp_path: Path) -> None:
    facts = lora_facts(kohya_lora(tmp_path / "some-style.safetensors"))
    assert facts.recipe is None
    warnings = [text for label, text in facts.rows if label == "warning"]
    assert any("has no few-step recipe" in text for text in warnings)
    rows = dict(facts.rows)
    assert rows["names"] == "kohya, 2 modules"
    assert rows["rank"] == "2, alpha 4, scale 2: 2 modules"
    assert rows["looks for"] == "sdxl (guessed)"
    assert len(rows["shapes"]) == len(rows["head"]) == 64


def test_a_lora_known_to_the_zoo_is_told_by_its_recipe(tmp_path: Path) -> None:
    path = kohya_lora(tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors")
    facts = lora_facts(path)
    assert facts.recipe == find_preset("dmd2-sdxl-4step-lora").recipe
    assert facts.name == "DMD2 SDXL LoRA, 4 steps"
    assert any("by its name alone" in text for _, text in facts.rows)


def test_a_lora_with_a_recipe_is_told_by_it(tmp_path: Path) -> None:
    recipe = find_preset("dmd2-sdxl-4step-lora").recipe
    source = kohya_lora(tmp_path / "a.safetensors", alpha=None, metadata={"modelspec.title": "T"})
    copy_with_recipe(source, tmp_path / "b.safetensors", recipe)
    facts = lora_facts(tmp_path / "b.safetensors")
    assert (facts.name, facts.recipe) == ("T", recipe)
    rows = dict(facts.rows)
    assert rows["looks for"] == "sdxl (recipe)"
    assert "alpha not stored" in rows["rank"]
    assert "warning" not in rows
