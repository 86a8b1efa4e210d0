"""Adapters and experts in modular pipelines: nothing half done, nothing switched off in silence."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModularPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.recipe import Guidance
from tests.expert_files import expert_folder
from tests.test_pipeline_modular import as_pil, draw, modular, wrapped
from tests.tiny.adapters import lora_file
from tests.tiny.families import FLUX, SDXL, WAN22
from tests.tiny.family import record_denoiser, seen_timesteps
from tests.tiny.tasks import EVEN_GRID, picture


def wan22() -> ModularPipeline:
    blocks: Any = diffusers.Wan22Blocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    parts = WAN22.build().components
    named = {name: parts[name] for name in pipe.component_names if parts.get(name) is not None}
    pipe.update_components(**named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_video(pipe: Any) -> torch.Tensor:
    arguments = {n: v for n, v in WAN22.arguments(1).items() if n in pipe.blocks.input_names}
    return pipe(**{**arguments, "output_type": "pt"}, seed=0, output="latents")


def test_a_recipe_the_guider_cannot_follow_leaves_no_adapter_behind(tmp_path: Path) -> None:
    stock = modular(FLUX)
    recipe = FLUX.recipe(guidance=Guidance(mode="cfg", scale=3.0))
    with pytest.raises(PipelineError, match="has not a guider"):
        FewStepModularPipeline.wrap(
            stock, recipe=recipe, adapter=lora_file(FLUX, tmp_path / "a.safetensors")
        )
    assert not any("lora" in key for key in stock.components["transformer"].state_dict())


def test_an_adapter_that_was_switched_off_is_put_on_again_with_a_warning(tmp_path: Path) -> None:
    pipe = wrapped(SDXL, adapter=lora_file(SDXL, tmp_path / "a.safetensors"))
    before = draw(pipe, SDXL)
    for layer in pipe.components["unet"].modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter([])
    with pytest.warns(UserWarning, match="had been switched off"):
        after = draw(pipe, SDXL)
    assert torch.equal(after, before)


def test_a_strength_that_is_not_named_is_the_blocks_own_as_a_noise_level() -> None:
    pipe = wrapped(FLUX, recipe=FLUX.recipe(timesteps=(1000.0, 900.0, 800.0, 500.0)))
    calls = record_denoiser(pipe, FLUX)
    draw(pipe, FLUX, image=as_pil(picture()))
    default = next(i.default for i in pipe.blocks.inputs if i.name == "strength")
    assert default == 0.6  # a share of the steps would begin at 800
    assert seen_timesteps(calls, FLUX) == pytest.approx([500.0], rel=1e-6)


def test_text_to_image_runs_every_step_of_blocks_that_could_start_from_an_image() -> None:
    pipe = wrapped(FLUX, recipe=FLUX.recipe(timesteps=EVEN_GRID))
    calls = record_denoiser(pipe, FLUX)
    draw(pipe, FLUX)
    assert seen_timesteps(calls, FLUX) == pytest.approx(EVEN_GRID, rel=1e-6)


@pytest.mark.parametrize("num_high", [1, 3])
def test_experts_of_two_networks_draw_the_classic_pipelines_picture(
    num_high: int, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(WAN22, tmp_path, own_networks=True, num_high=num_high)
    classic: Any = FewStepPipeline.wrap(WAN22.build(), adapter=folder)
    expected = classic(**WAN22.arguments(1), seed=0)[0]
    stock: Any = wan22()
    assert stock.config.boundary_ratio == 0.875
    pipe = FewStepModularPipeline.wrap(stock, adapter=folder)
    calls = record_denoiser(pipe, WAN22)
    found = draw_video(pipe)
    names = [name for name, _, _ in calls]
    assert names == ["transformer"] * num_high + ["transformer_2"] * (4 - num_high)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stock.register_to_config(boundary_ratio=0.1)
    with pytest.raises(PipelineError, match="boundary_ratio is 0.1"):
        draw_video(pipe)
    assert pipe.unwrap() is stock
    assert stock.config.boundary_ratio == 0.875
    assert recipe.experts


def test_both_networks_are_guided_as_the_recipe_says() -> None:
    stock = wan22()
    guiders = [stock.components[name] for name in ("guider", "guider_2")]
    assert all(guider._enabled for guider in guiders)
    pipe = FewStepModularPipeline.wrap(stock, recipe=WAN22.recipe())
    calls = record_denoiser(pipe, WAN22)
    draw_video(pipe)
    assert [len(sample) for _, _, sample in calls] == [1] * 4
    pipe.unwrap()
    assert [stock.components[name] for name in ("guider", "guider_2")] == guiders
