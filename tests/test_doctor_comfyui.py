"""What the doctor says of ComfyUI, against ComfyUI's own arithmetic where it is installed."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.adapters import save_adapter
from fewstep.doctor import examine_adapter
from fewstep.doctor.comfyui import comfy_settings, comfy_sigmas, runtime_levels, sigmas_text
from fewstep.doctor.consumers import ComfySettings
from fewstep.recipe import FewStepRecipe, Guidance, Lora, Sampler
from fewstep.zoo import entries, entry
from tests.pains.common import finding, lora_tensors, write_lora
from tests.tiny_pipelines import FLUX, SD3, SDXL, WAN21, flow_recipe, vp_recipe

LIKE_MANUAL_SIGMAS = re.compile(r"[-+]?(?:\d*\.*\d+)")
"""How the ManualSigmas node finds numbers in its text: an exponent becomes a number of its own."""
STOCK_SIMPLE = """
import json
import sys

sys.path.insert(0, sys.argv[1])
sys.argv = ["fewstep", "--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_sampling as ms
from comfy.samplers import simple_scheduler


class Flow(ms.ModelSamplingDiscreteFlow, ms.CONST):
    pass


class Eps(ms.ModelSamplingDiscrete, ms.EPS):
    pass


flow, eps = Flow(), Eps()
flow.set_parameters(shift=5.0, multiplier=1000)
found = {}
for name, model in (("flow", flow), ("eps", eps)):
    sigmas = simple_scheduler(model, 4)
    found[name] = sigmas.tolist()
    found[f"told_{name}"] = [float(model.timestep(s)) for s in sigmas[:-1]]
print(json.dumps(found))
"""


def settings(recipe: FewStepRecipe) -> ComfySettings:
    return comfy_settings(recipe, recipe.grid(), weight=1.0)


def test_flow_sigmas_are_the_recipes_and_vp_sigmas_are_divided_by_alpha() -> None:
    flow = flow_recipe("wan")
    assert comfy_sigmas(flow, flow.grid()) == flow.grid().sigmas
    vp = vp_recipe("sdxl")
    ve = comfy_sigmas(vp, vp.grid())
    assert ve[0] == pytest.approx(14.6146, abs=1e-3)  # sigma_max of Stable Diffusion
    for karras, sigma in zip(ve, vp.grid().sigmas, strict=True):
        assert karras / math.hypot(1.0, karras) == pytest.approx(sigma)


def test_the_text_is_read_back_as_the_same_numbers() -> None:
    sigmas = (14.614643, 0.5, 0.00001, 1e-9, 0.0)
    read = [float(text) for text in LIKE_MANUAL_SIGMAS.findall(sigmas_text(sigmas))]
    assert read == pytest.approx(sigmas, abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "scheduler"),
    [
        (flow_recipe("wan"), "simple"),
        (vp_recipe("sdxl"), "simple"),
        (vp_recipe("sdxl", timesteps=(999.0, 759.0, 499.0, 259.0)), None),
        (vp_recipe("sdxl", timesteps=(800.0,)), None),
        (flow_recipe("wan", (1000.0, 900.0, 750.0, 500.0)), None),
    ],
)
def test_a_stock_scheduler_is_named_only_where_it_gives_these_sigmas(
    recipe: FewStepRecipe, scheduler: str | None
) -> None:
    found = settings(recipe)
    assert found.scheduler == scheduler
    assert any(node.startswith("BasicScheduler") for node in found.nodes) == (scheduler is not None)


def test_sampler_guidance_and_shift_are_those_of_the_recipe() -> None:
    assert settings(SD3.recipe()).sampler_name == "euler"
    assert settings(SDXL.recipe(stochasticity=1.0)).sampler_name == "lcm"
    tcd = settings(SDXL.recipe(stochasticity=0.3))
    assert tcd.sampler_name is None
    assert "TCD" in tcd.notes[0]
    corrected = replace(SD3.recipe(), sampler=Sampler(noise_correction=True))
    assert settings(corrected).sampler_name is None
    assert "ModelSamplingSD3: shift 5" in settings(WAN21.recipe()).nodes
    assert not any("ModelSampling" in node for node in settings(FLUX.recipe()).nodes)
    guided = replace(FLUX.recipe(), guidance=Guidance(mode="embedded", scale=3.5))
    assert "FluxGuidance: guidance 3.5" in settings(guided).nodes
    assert (settings(guided).cfg, settings(SD3.recipe()).cfg) == (1.0, 1.0)
    cfg = replace(SD3.recipe(), guidance=Guidance(mode="cfg", scale=7.5, negative_prompt="works"))
    assert settings(cfg).cfg == 7.5


def test_levels_without_torch_are_the_recipes_with_what_the_network_is_told() -> None:
    levels = runtime_levels(WAN21.recipe(), 4)
    wanted = [1000.0, 937.5, 833.3, 625.0, 0.0]
    assert [level.timestep for level in levels] == pytest.approx(wanted, abs=0.1)
    assert all(level.alpha + level.sigma == pytest.approx(1.0) for level in levels)
    grid = SDXL.recipe().grid()
    clocked = replace(grid, clock=tuple(t / 4.0 for t in grid.timesteps))
    nitro = replace(SDXL.recipe(), grids=(clocked,))
    assert runtime_levels(nitro, 4)[0].timestep == pytest.approx(999.0 / 4.0)
    assert runtime_levels(nitro, 4)[0].sigma == grid.sigmas[0]


def test_an_alpha_in_metadata_is_put_into_the_weight_for_comfyui(tmp_path: Path) -> None:
    tensors = lora_tensors(SD3.build(), "transformer")
    config = {"transformer.r": 2, "transformer.lora_alpha": 1}
    file = write_lora(
        tmp_path / "a.safetensors",
        tensors,
        prefix="transformer.",
        metadata={
            "lora_adapter_metadata": json.dumps(config),
            "fewstep.recipe": SD3.recipe(lora=Lora(scale=0.5)).to_json(),
        },
    )
    found = examine_adapter(file)
    assert finding(found, "comfyui/alpha-lost").evidence["scale"] == 0.5
    assert found.comfyui is not None
    assert found.comfyui.nodes[0] == "LoraLoaderModelOnly: strength_model 0.25"
    assert finding(found, "comfyui/alpha-lost").fix.endswith("or strength_model 0.25")


def test_a_recipe_of_another_family_than_the_file_is_told(tmp_path: Path) -> None:
    tensors = lora_tensors(SDXL.build(), "unet")
    file = write_lora(tmp_path / "a.safetensors", tensors, prefix="unet.")
    found = examine_adapter(file, recipe="zoo:hyper-sd3-4steps-cfg-lora")
    assert "the recipe is for sd3" in finding(found, "recipe/other-family").sentence
    assert finding(found, "comfyui/keys-not-loaded").evidence["dialect"] == "diffusers/PEFT"
    same = examine_adapter(file, recipe="zoo:dmd2-sdxl-4step-lora")
    assert all(f.code != "recipe/other-family" for f in same.findings)


def test_sdxl_turbo_is_euler_ancestral_in_comfyui_and_nothing_like_it_is() -> None:
    """k-diffusion's step with eta 1 goes down to sigma_next^2 / sigma, then adds noise."""
    recipe = entry("sdxl-turbo").required_recipe()
    names = [comfy_settings(recipe, g, weight=1.0).sampler_name for g in recipe.grids]
    assert names == ["euler", *["euler_ancestral"] * 3]
    grid = recipe.grids[-1]
    other = replace(grid, stops=(0.5 * grid.stops[0], *grid.stops[1:]))
    assert comfy_settings(recipe, other, weight=1.0).sampler_name is None


def test_embedded_guidance_has_a_node_for_some_families_only() -> None:
    lcm = entry("lcm-dreamshaper-v7").required_recipe()
    found = comfy_settings(lcm, lcm.grid(4), weight=1.0)
    assert (found.sampler_name, any("FluxGuidance" in node for node in found.nodes)) == (
        None,
        False,
    )
    flux = entry("fasthunyuan").required_recipe()
    assert "FluxGuidance: guidance 6" in comfy_settings(flux, flux.grid(), weight=1.0).nodes


def test_names_that_comfyui_passes_over_are_told(tmp_path: Path) -> None:
    def saved(name: str, family: str, component: str) -> Path:
        source = SDXL if component == "unet" else WAN21
        return save_adapter(
            tmp_path / name,
            lora_tensors(source.build(), component),
            recipe=source.recipe(),
            rank=2,
            alpha=2.0,
            title="test",
            component="unet" if component == "unet" else "transformer",
        )

    for family, component in (("sdxl", "unet"), ("wan", "transformer")):
        found = examine_adapter(saved(f"{family}.safetensors", family, component))
        lost = finding(found, "comfyui/keys-not-loaded")
        assert (family in lost.sentence, lost.severity) == (True, "warning")


@pytest.mark.parametrize(
    ("linear", "matrices", "passed_over"),
    [
        ("attn1.to_q", (".lora_A.weight", ".lora_B.weight"), True),
        ("attn1.processor.to_q", ("_lora.down.weight", "_lora.up.weight"), False),
        ("ff.net.2", (".lora_A.weight", ".lora_B.weight"), False),
    ],
)
def test_of_unet_names_comfyui_passes_over_new_attention_only(
    linear: str, matrices: tuple[str, str], passed_over: bool, tmp_path: Path
) -> None:
    """As `model_lora_keys_unet` has it: `.to_` is `.processor.to_` there, all else is the same."""
    layer = f"unet.down_blocks.1.attentions.0.transformer_blocks.0.{linear}"
    tensors = {layer + end: torch.ones(2, 2) for end in matrices}
    tensors["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"] = torch.ones(2, 2)
    tensors["unet.down_blocks.1.attentions.0.proj_in.lora_B.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    found = examine_adapter(tmp_path / "a.safetensors")
    lost = [f for f in found.findings if f.code == "comfyui/keys-not-loaded"]
    assert bool(lost) is passed_over
    assert (
        not lost or "(1 of 2 modules): a picture with only a part of the LoRA" in lost[0].sentence
    )


def test_every_recipe_of_the_zoo_has_settings_or_a_reason() -> None:
    for known in entries():
        recipe = known.recipe
        for grid in () if recipe is None else recipe.grids:
            assert recipe is not None
            found = comfy_settings(recipe, grid, weight=recipe.lora.scale)
            assert len(found.sigmas) == grid.num_steps + 1, known.name
            assert (found.sampler_name is None) <= bool(found.notes), known.name
            read = [float(text) for text in LIKE_MANUAL_SIGMAS.findall(sigmas_text(found.sigmas))]
            assert read == pytest.approx(found.sigmas, abs=1e-6), known.name
            assert len(runtime_levels(recipe, grid.num_steps)) == grid.num_steps + 1


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI")
def test_simple_sigmas_are_comfyuis_own() -> None:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", STOCK_SIMPLE, os.environ["COMFYUI_PATH"]],
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    flow, vp = flow_recipe("wan"), vp_recipe("sdxl")
    assert comfy_sigmas(flow, flow.grid()) == pytest.approx(said["flow"], abs=1e-4)
    assert comfy_sigmas(vp, vp.grid()) == pytest.approx(said["eps"], rel=1e-4)
    assert said["told_flow"] == pytest.approx(flow.grid().timesteps, abs=0.1)
    assert said["told_eps"] == list(vp.grid().timesteps)
