"""The latent consistency pipelines, which speak to their scheduler in words of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.pipeline import FewStepPipeline
from fewstep.zoo import entry
from tests.tiny.family import embeds
from tests.tiny.parts import kl, stock

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def unet() -> Any:
    return stock.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        time_cond_proj_dim=16,
    )


def pipeline(kind: str) -> Any:
    torch.manual_seed(0)
    scheduler = stock.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    pipe = getattr(stock, kind)(
        vae=kl(4),
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **arguments: Any) -> Tensor:
    prompt = embeds(1, 4, 8)
    return pipe(prompt_embeds=prompt, output_type="latent", return_dict=False, **arguments)[0]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_text_to_image_is_the_stock_pipeline_with_its_own_scheduler(steps: int) -> None:
    pipe = pipeline("LatentConsistencyModelPipeline")
    generator = torch.Generator().manual_seed(3)
    expected = drawn(
        pipe,
        num_inference_steps=steps,
        guidance_scale=8.0,
        height=16,
        width=16,
        generator=generator,
        original_inference_steps=50,
    )
    ours: Any = FewStepPipeline.wrap(pipe, recipe="zoo:lcm-dreamshaper-v7", steps=steps)
    torch.testing.assert_close(
        drawn(ours, height=16, width=16, seed=3), expected, rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize(("strength", "first"), [(1.0, 999.0), (0.5, 499.0), (0.05, 259.0)])
def test_image_to_image_starts_at_the_trained_level_of_its_strength(
    strength: float, first: float
) -> None:
    ours: Any = FewStepPipeline.wrap(
        pipeline("LatentConsistencyModelImg2ImgPipeline"), recipe="zoo:lcm-dreamshaper-v7"
    )
    told: list[float] = []
    ours.unet.register_forward_pre_hook(lambda _, args: told.append(float(args[1])))
    drawn(ours, image=PICTURE, strength=strength, seed=3)
    grid = entry("lcm-dreamshaper-v7").required_recipe().grid().timesteps
    assert told == list(grid[grid.index(first) :])
