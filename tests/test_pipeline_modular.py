"""Modular pipelines: grid, guider, noise and adapter of the recipe, as in the classic ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModularPipeline

from fewstep.errors import PipelineError, RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.recipe import Guidance, Sampler
from fewstep.schedulers import FewStepScheduler
from tests.tiny.adapters import lora_file
from tests.tiny.families import FLUX, QWEN_IMAGE, SDXL, WAN21
from tests.tiny.family import TinyFamily, record_denoiser, seen_timesteps
from tests.tiny.recipes import FLOW_GRID, VP_GRID, flow_recipe
from tests.tiny.tasks import EVEN_GRID, picture

BLOCKS = {
    "sdxl": "StableDiffusionXLAutoBlocks",
    "flux": "FluxAutoBlocks",
    "qwen-image": "QwenImageAutoBlocks",
    "wan21": "WanBlocks",
}
FAMILIES = pytest.mark.parametrize(
    "family", [SDXL, FLUX, QWEN_IMAGE, WAN21], ids=lambda family: family.name
)


def modular(family: TinyFamily) -> ModularPipeline:
    """The modular pipeline around a family's components, without its text encoder block."""
    stock: Any = diffusers
    blocks = getattr(stock, BLOCKS[family.name])()
    blocks.sub_blocks.pop("text_encoder")
    if family is QWEN_IMAGE:  # its decoder cannot leave latents alone
        blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    parts = family.build().components
    named = {name: part for name, part in parts.items() if part is not None}
    pipe.update_components(**{n: p for n, p in named.items() if n in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wrapped(family: TinyFamily, **kwargs: Any) -> FewStepModularPipeline:
    recipe = None if "adapter" in kwargs else kwargs.pop("recipe", family.recipe())
    return FewStepModularPipeline.wrap(modular(family), recipe=recipe, **kwargs)


def arguments_of(pipe: ModularPipeline, family: TinyFamily, batch: int = 1) -> dict[str, Any]:
    arguments = family.arguments(batch)
    return {n: value for n, value in arguments.items() if n in pipe.blocks.input_names}


def draw(pipe: FewStepModularPipeline, family: TinyFamily, batch: int = 1, **kwargs: Any) -> Any:
    arguments = {**arguments_of(pipe, family, batch), "seed": 3, **kwargs}
    if family is WAN21:  # nor can Wan's, which others of its blocks need
        arguments["output_type"] = "pt"
    return pipe(**arguments, output="latents" if family in (WAN21, QWEN_IMAGE) else "images")


@FAMILIES
def test_the_denoiser_sees_the_grid_once_per_step(family: TinyFamily) -> None:
    pipe = wrapped(family)
    calls = record_denoiser(pipe, family)
    draw(pipe, family)
    expected = VP_GRID if family.is_vp else FLOW_GRID
    assert seen_timesteps(calls, family) == pytest.approx(expected, rel=1e-6)
    assert [len(sample) for _, _, sample in calls] == [1] * 4


@FAMILIES
def test_the_picture_is_the_classic_pipelines(family: TinyFamily) -> None:
    classic = FewStepPipeline.wrap(family.build(), recipe=family.recipe())
    expected = classic(**family.arguments(1), seed=3)[0]
    found = draw(wrapped(family), family)
    if family in (FLUX, QWEN_IMAGE):  # the classic one leaves its latents packed
        expected = unpacked(expected, found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def unpacked(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    channels, height, width = like.shape[1], *like.shape[-2:]
    patches = rows.reshape(1, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


@FAMILIES
def test_fresh_noise_repeats_for_the_seed(family: TinyFamily) -> None:
    recipe = replace(family.recipe(), sampler=Sampler(stochasticity=1.0))
    pipe = wrapped(family, recipe=recipe)
    first, again, other = (draw(pipe, family, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_has_one_seed_per_image() -> None:
    pipe = wrapped(SDXL, recipe=SDXL.recipe(stochasticity=1.0))
    both = draw(pipe, SDXL, batch=2, seed=[3, 8])
    torch.testing.assert_close(both[:1], draw(pipe, SDXL), rtol=1e-4, atol=1e-5)
    with pytest.raises(PipelineError, match="got 3 seeds for 2 images"):
        draw(pipe, SDXL, batch=2, seed=[1, 2, 3])


@pytest.mark.parametrize("family", [SDXL, QWEN_IMAGE, WAN21], ids=lambda f: f.name)
def test_guidance_becomes_the_guider(family: TinyFamily) -> None:
    guidance = Guidance(mode="cfg", scale=2.0, negative_prompt="works")
    pipe = wrapped(family, recipe=replace(family.recipe(), guidance=guidance))
    calls = record_denoiser(pipe, family)
    embeds = family.arguments(1)
    negative = {"negative_prompt_embeds": -embeds["prompt_embeds"]}
    if family is SDXL:
        negative["negative_pooled_prompt_embeds"] = -embeds["pooled_prompt_embeds"]
    if family is QWEN_IMAGE:
        negative["negative_prompt_embeds_mask"] = torch.ones(1, 6).long()
    draw(pipe, family, **negative)
    assert sum(len(sample) for _, _, sample in calls) == 8
    guider = pipe.components["guider"]
    assert guider.guidance_scale == 2.0
    assert not guider.use_original_formulation  # uncond + w (cond - uncond), as ours


def test_flux_is_told_its_embedded_scale() -> None:
    pipe = wrapped(FLUX, recipe=FLUX.recipe(guidance=Guidance(mode="embedded", scale=3.5)))
    state = pipe(**arguments_of(pipe, FLUX), seed=3)
    assert state.get("guidance_scale") == 3.5
    with pytest.raises(
        PipelineError, match="guidance is 'cfg', but FluxModularPipeline has not a guider"
    ):
        wrapped(FLUX, recipe=FLUX.recipe(guidance=Guidance(mode="cfg", scale=2.0)))


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 1), (0.2, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
@pytest.mark.parametrize("family", [SDXL, FLUX], ids=lambda f: f.name)
def test_strength_is_snapped_and_leaves_a_step(
    family: TinyFamily, strength: float, steps: int
) -> None:
    recipe = family.recipe() if family.is_vp else family.recipe(timesteps=EVEN_GRID)
    pipe = wrapped(family, recipe=recipe)
    calls = record_denoiser(pipe, family)
    draw(pipe, family, image=as_pil(picture()), strength=strength)
    grid = VP_GRID if family.is_vp else EVEN_GRID
    assert seen_timesteps(calls, family) == pytest.approx(grid[-steps:], rel=1e-6)


def as_pil(pixels: torch.Tensor) -> Any:
    from PIL import Image

    array = (255 * pixels[0]).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


@pytest.mark.parametrize("family", [SDXL, FLUX], ids=lambda f: f.name)
def test_an_adapter_brings_its_recipe_and_comes_off_again(
    family: TinyFamily, tmp_path: Path
) -> None:
    file = lora_file(family, tmp_path / "a.safetensors")
    plain = draw(wrapped(family), family)
    stock = modular(family)
    scheduler = stock.components["scheduler"]
    pipe = FewStepModularPipeline.wrap(stock, adapter=file)
    assert pipe is stock
    assert type(pipe).__name__ == type(modular(family)).__name__
    assert isinstance(pipe.components["scheduler"], FewStepScheduler)
    with_adapter = draw(pipe, family)
    assert not torch.allclose(with_adapter, plain, atol=1e-3)
    classic = FewStepPipeline.wrap(family.build(), adapter=file)(**family.arguments(1), seed=3)[0]
    if family is SDXL:
        torch.testing.assert_close(with_adapter, classic, rtol=1e-4, atol=1e-4)
    back = pipe.unwrap()
    assert back is stock
    assert not isinstance(back, FewStepModularPipeline)
    assert back.components["scheduler"] is scheduler
    keys = back.components[family.denoisers[0]].state_dict()
    assert not any("lora" in key for key in keys)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (flow_recipe("wan"), "this recipe is for wan, but FluxModularPipeline samples flux"),
        (flow_recipe("flux", (800.0, 400.0)), "begins at sigma 0.8, but .* draw noise of"),
        (
            replace(
                flow_recipe("flux", EVEN_GRID, stochasticity=1.0),
                grids=(replace(flow_recipe("flux").grids[0], sizes=(0.5, 0.5, 1.0, 1.0)),),
            ),
            "samples grow from step to step, which FluxModularPipeline cannot do",
        ),
    ],
)
def test_what_blocks_cannot_do_is_refused(recipe: Any, words: str) -> None:
    stock = modular(FLUX)
    with pytest.raises(PipelineError, match=words):
        FewStepModularPipeline.wrap(stock, recipe=recipe)
    assert not isinstance(stock.components["scheduler"], FewStepScheduler)


def test_calls_that_contradict_the_recipe_are_errors() -> None:
    pipe = wrapped(SDXL)
    with pytest.raises(PipelineError, match="timesteps was passed, but the recipe owns the grid"):
        draw(pipe, SDXL, timesteps=[999, 1])
    with pytest.raises(RecipeError, match="not made for 3 steps"):
        draw(pipe, SDXL, num_inference_steps=3)
    with pytest.raises(PipelineError, match="already wrapped"):
        FewStepModularPipeline.wrap(pipe, recipe=SDXL.recipe())
    with pytest.raises(PipelineError, match="adapter_scale was passed without an adapter"):
        FewStepModularPipeline.wrap(modular(SDXL), recipe=SDXL.recipe(), adapter_scale=0.5)
    pipe.update_components(scheduler=diffusers.LCMScheduler())
    with pytest.raises(PipelineError, match="the scheduler was replaced by LCMScheduler"):
        draw(pipe, SDXL)


def test_the_classic_wrap_points_to_the_modular_one() -> None:
    pipe: Any = modular(SDXL)
    with pytest.raises(PipelineError, match="use FewStepModularPipeline.wrap"):
        FewStepPipeline.wrap(pipe, recipe=SDXL.recipe())
