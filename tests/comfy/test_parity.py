"""Same adapter, same seed: FewStepPipeline and ComfyUI draw the same picture.

What stands for the pipelines that diffusers lacks, `references.in_a_loop`, is compared bit for bit
with those it has.
"""

import pytest
import torch

from tests.comfy import references
from tests.comfy.harness import Comfy
from tests.comfy.parity import (
    CASES,
    PARITY,
    PICTURE_SEED,
    SAMPLERS,
    SEED,
    STRENGTH,
    parity_error,
    recipe_for,
)
from tests.comfy.testkit import latents, left_half
from tests.comfy.tiny_models import ALL_MODELS, PIXART, SD3, SD15, WAN, TinyModel


def named(model: TinyModel) -> str:
    """For test ids."""
    return model.name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ALL_MODELS, ids=named)
def test_the_latents_are_fewsteppipelines(
    comfy: Comfy, model: TinyModel, sampler: str, case: str
) -> None:
    assert parity_error(comfy, model, sampler, case) <= PARITY


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", [SD3, SD15], ids=named)
def test_the_loop_is_the_stock_image_to_image(model: TinyModel, sampler: str) -> None:
    recipe = recipe_for(model, SAMPLERS[sampler])
    image = latents(PICTURE_SEED, 1, *model.latent_shape)
    task = {"seed": SEED, "image": image, "strength": STRENGTH}
    drawn = references.in_a_loop(model, recipe, **task)
    expected = references.image_to_image(model, recipe, **task)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_is_wans_video_to_video(sampler: str) -> None:
    recipe, video = recipe_for(WAN, SAMPLERS[sampler]), references.frames(WAN, PICTURE_SEED)
    task = {"seed": SEED, "strength": STRENGTH}
    drawn = references.in_a_loop(WAN, recipe, image=references.encoded(WAN, video), **task)
    expected = references.image_to_image(WAN, recipe, image=video, **task)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", [SD3, SD15], ids=named)
def test_the_loop_is_the_stock_inpainting(model: TinyModel, sampler: str) -> None:
    recipe = recipe_for(model, SAMPLERS[sampler])
    image = latents(PICTURE_SEED, 1, *model.latent_shape)
    mask = left_half(*model.latent_shape[-2:])
    drawn = references.in_a_loop(model, recipe, seed=SEED, image=image, mask=mask)
    expected = references.inpainting(model, recipe, seed=SEED, image=image)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_asks_pixarts_network_as_its_pipeline_does(sampler: str) -> None:
    recipe = recipe_for(PIXART, SAMPLERS[sampler])
    blank = torch.zeros(1, *PIXART.latent_shape)
    drawn = references.in_a_loop(PIXART, recipe, seed=SEED, image=blank)
    expected = references.reference(PIXART, recipe, seed=SEED)
    assert torch.equal(drawn, expected)
