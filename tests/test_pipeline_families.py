"""Every family: the recipe's grid, one pass per step, pictures that depend on their seed alone."""

from typing import Any

import pytest
import torch
from diffusers import LCMScheduler

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Sampler
from fewstep.schedulers import FewStepScheduler
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLOW_GRID,
    FLUX,
    SD3,
    SD15,
    VP_GRID,
    WAN22,
    TinyFamily,
    flow_recipe,
    record_denoiser,
    seen_timesteps,
    vp_recipe,
)

EVERY = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)


def wrapped(family: TinyFamily, **changes: object) -> FewStepPipeline:
    pipe = FewStepPipeline.wrap(family.build(), recipe=family.recipe(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, family: TinyFamily, batch: int = 2, **kwargs: Any) -> torch.Tensor:
    return pipe(**family.arguments(batch), **kwargs)[0]


def first_noise(family: TinyFamily, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(family.latent_shape, generator=generator)


@EVERY
def test_the_denoiser_sees_exactly_the_recipes_grid_once_per_step(family: TinyFamily) -> None:
    pipe = wrapped(family)
    calls = record_denoiser(pipe, family)
    draw(pipe, family, batch=2, seed=0)
    expected = VP_GRID if family.is_vp else FLOW_GRID
    assert seen_timesteps(calls, family) == pytest.approx(expected, rel=1e-6)
    # un-doubled: guidance is none, so no unconditional half rides along
    assert [len(sample) for _, _, sample in calls] == [2, 2, 2, 2]


@EVERY
def test_a_picture_depends_on_its_seed_alone(family: TinyFamily) -> None:
    pipe = wrapped(family, sampler=Sampler(stochasticity=1.0))
    both = draw(pipe, family, batch=2, seed=[11, 12])
    again = draw(pipe, family, batch=2, seed=11)
    assert torch.equal(both, again)  # seed, seed + 1
    alone = draw(pipe, family, batch=1, seed=11)
    torch.testing.assert_close(alone[0], both[0], rtol=1e-4, atol=1e-5)
    other = draw(pipe, family, batch=1, seed=12)
    assert not torch.allclose(other[0], alone[0], atol=0.1)


@EVERY
def test_stochastic_steps_draw_from_the_image_shaped_stream(family: TinyFamily) -> None:
    """First the initial noise, then one draw per re-noising step, from one float32 stream."""
    pipe = wrapped(family, sampler=Sampler(stochasticity=1.0))
    calls = record_denoiser(pipe, family)
    predicted: list[torch.Tensor] = []
    scheduler: Any = pipe.scheduler
    step = scheduler.step

    def keep_x0(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result = step(*args, **kwargs)
        predicted.append(result[1])
        return result

    scheduler.step = keep_x0
    draw(pipe, family, batch=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    levels = pipe.recipe.levels()
    noise = [torch.randn(family.latent_shape, generator=generator) for _ in range(4)]
    packed = [pack_like(pipe, n, predicted[0]) for n in noise]
    starts = [sample for _, _, sample in calls]
    first = starts[0][0] if isinstance(starts[0], list) else starts[0]
    torch.testing.assert_close(
        first.reshape(-1), levels[0].sigma * packed[0].reshape(-1), rtol=1e-5, atol=1e-6
    )
    for i in (1, 2, 3):
        expected = levels[i].alpha * predicted[i - 1] + levels[i].sigma * packed[i]
        got = starts[i][0] if isinstance(starts[i], list) else starts[i]
        torch.testing.assert_close(got.reshape(-1), expected.reshape(-1), rtol=1e-4, atol=1e-4)


def pack_like(pipe: FewStepPipeline, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """FLUX and Qwen-Image cut latents into 2x2 patches; the others keep the image's shape."""
    if latents.ndim != 3:
        return noise[None]
    *_, channels, height, width = noise.shape
    patches = noise.reshape(channels, height // 2, 2, width // 2, 2)
    return patches.permute(1, 3, 0, 2, 4).reshape(1, -1, channels * 4)


def test_a_renoising_vp_recipe_draws_what_stock_diffusers_draws_with_lcm() -> None:
    """DMD2's published way: LCMScheduler with the trained timesteps, from the same noise."""
    ours = wrapped(SD15, sampler=Sampler(stochasticity=1.0))
    stock: Any = SD15.build()
    stock.scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012)
    noise = first_noise(SD15, 1)[None]
    scaled = ours.recipe.levels()[0].sigma * noise  # ours starts at sigma 0.998, LCM at 1
    pictures = [
        stock(
            **SD15.arguments(1),
            timesteps=[999, 749, 499, 249],
            guidance_scale=1.0,
            latents=scaled,
            generator=torch.Generator().manual_seed(2),
        )[0],
        draw(ours, SD15, 1, latents=noise, generator=torch.Generator().manual_seed(2)),
    ]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)
def test_a_flow_start_below_full_noise_begins_with_scaled_noise(family: TinyFamily) -> None:
    pipe = FewStepPipeline.wrap(family.build(), recipe=flow_recipe(family.family, (800.0, 400.0)))
    calls = record_denoiser(pipe, family)
    draw(pipe, family, batch=1, seed=3)
    packed = pack_like(pipe, first_noise(family, 3), calls[0][2])
    torch.testing.assert_close(calls[0][2], 0.8 * packed)


def test_a_vp_start_below_full_noise_begins_with_scaled_noise() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=vp_recipe("sd15", timesteps=(399.0,)))
    calls = record_denoiser(pipe, SD15)
    draw(pipe, SD15, batch=1, seed=3)
    sigma = pipe.recipe.levels()[0].sigma
    torch.testing.assert_close(calls[0][2], sigma * first_noise(SD15, 3)[None])
    assert len(calls) == 1


def test_wan_22_splits_the_grid_between_its_two_transformers() -> None:
    pipe = wrapped(WAN22)
    calls = record_denoiser(pipe, WAN22)
    draw(pipe, WAN22, batch=1, seed=0)
    names = [name for name, _, _ in calls]
    assert names == ["transformer", "transformer", "transformer_2", "transformer_2"]


@pytest.mark.parametrize("family", [SD15, SD3, FLUX], ids=lambda family: family.name)
def test_half_precision_starts_from_the_same_float32_noise(family: TinyFamily) -> None:
    pipe = wrapped(family)
    pipe.to(torch.bfloat16)
    calls = record_denoiser(pipe, family)
    arguments = family.arguments(1)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(torch.bfloat16)
    pipe(**arguments, seed=9)
    sample = calls[0][2]
    expected = pipe.recipe.levels()[0].sigma * pack_like(pipe, first_noise(family, 9), sample)
    assert torch.equal(sample, expected.to(torch.bfloat16))


@EVERY
def test_a_generator_works_like_the_seed(family: TinyFamily) -> None:
    pipe = wrapped(family, sampler=Sampler(stochasticity=1.0))
    by_seed = draw(pipe, family, batch=1, seed=21)
    by_generator = draw(pipe, family, batch=1, generator=torch.Generator().manual_seed(21))
    assert torch.equal(by_seed, by_generator)


@pytest.mark.parametrize("family", [SD15, SD3, FLUX], ids=lambda family: family.name)
def test_the_bare_scheduler_serves_a_stock_pipeline_too(family: TinyFamily) -> None:
    pipe: Any = family.build()
    pipe.scheduler = FewStepScheduler(family.recipe())
    calls = record_denoiser(pipe, family)
    pipe(**family.arguments(1), num_inference_steps=4, guidance_scale=1.0)
    expected = VP_GRID if family.is_vp else FLOW_GRID
    assert seen_timesteps(calls, family) == pytest.approx(expected, rel=1e-6)
