"""Image to image and inpainting: trained timesteps only, and always a step to take."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.image_to_image import start_index
from fewstep.recipe import Sampler
from fewstep.schedulers import FewStepScheduler
from tests.tiny.tasks import EVEN_GRID, arguments_of, made_for
from tests.tiny_pipelines import (
    FLOW_GRID,
    FLUX,
    QWEN_IMAGE,
    SD3,
    SD15,
    SDXL,
    VP_GRID,
    WAN21,
    Z_IMAGE,
    TinyFamily,
    flow_recipe,
    record_denoiser,
    seen_timesteps,
    vp_recipe,
)

TASKS: dict[str, tuple[TinyFamily, type[DiffusionPipeline]]] = {
    "sd15": (SD15, diffusers.StableDiffusionImg2ImgPipeline),
    "sdxl": (SDXL, diffusers.StableDiffusionXLImg2ImgPipeline),
    "sd3": (SD3, diffusers.StableDiffusion3Img2ImgPipeline),
    "flux": (FLUX, diffusers.FluxImg2ImgPipeline),
    "qwen-image": (QWEN_IMAGE, diffusers.QwenImageImg2ImgPipeline),
    "z-image": (Z_IMAGE, diffusers.ZImageImg2ImgPipeline),
}
INPAINT: dict[str, tuple[TinyFamily, type[DiffusionPipeline]]] = {
    "sd15": (SD15, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (SDXL, diffusers.StableDiffusionXLInpaintPipeline),
    "flux": (FLUX, diffusers.FluxInpaintPipeline),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("strength", "steps"), [(0.0, 1), (0.1, 1), (0.2, 1), (0.5, 2), (0.6, 2), (1.0, 4)]
)
def test_every_strength_runs_trained_timesteps_and_at_least_one(
    name: str, strength: float, steps: int
) -> None:
    family, task = TASKS[name]
    pipe = made_for(family, task)
    calls = record_denoiser(pipe, family)
    pipe(**arguments_of(pipe, family), strength=strength, seed=0)
    grid = VP_GRID if family.is_vp else EVEN_GRID
    assert seen_timesteps(calls, family) == pytest.approx(grid[-steps:], rel=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_it_starts_from_the_picture_at_the_noise_of_the_first_timestep(name: str) -> None:
    family, task = TASKS[name]
    pipe = made_for(family, task)
    calls = record_denoiser(pipe, family)
    latents = torch.rand(1, *family.latent_shape)  # an image of 4 channels is taken as latents
    pipe(**{**arguments_of(pipe, family), "image": latents}, strength=0.5, seed=8)
    noise = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(8))
    level = pipe.recipe.levels()[2]
    scheduler: Any = pipe.scheduler
    assert scheduler.begin_index == 2  # no look-up of a timestep that is on the device
    torch.testing.assert_close(calls[0][2], level.alpha * latents + level.sigma * noise)


@torch.no_grad()
def test_a_video_is_noised_once_whatever_its_first_timestep() -> None:
    recipe = flow_recipe("wan", timesteps=(900.0, 700.0, 500.0, 250.0))
    pipe: Any = made_for(WAN21, diffusers.WanVideoToVideoPipeline, recipe=recipe)
    calls = record_denoiser(pipe, WAN21)
    clip = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # one frame
    arguments = {k: v for k, v in WAN21.arguments(1).items() if k != "num_frames"}
    pipe(**arguments, video=clip, strength=0.8, seed=8)
    clean = pipe.vae.encode(2.0 * clip[:, :, None] - 1.0).latent_dist.mode()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    level = recipe.levels()[4 - len(calls)]
    torch.testing.assert_close(calls[0][2], level.alpha * clean + level.sigma * noise)


@pytest.mark.parametrize("name", TASKS)
def test_renoising_image_to_image_repeats_for_the_same_seed(name: str) -> None:
    family, task = TASKS[name]
    pipe = made_for(family, task, sampler=Sampler(stochasticity=1.0))
    pictures = [
        pipe(**arguments_of(pipe, family), strength=0.8, seed=seed)[0] for seed in (4, 4, 5)
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("name", INPAINT)
@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
def test_inpainting_runs_trained_timesteps_and_at_least_one(name: str, strength: float) -> None:
    family, task = INPAINT[name]
    pipe = made_for(family, task)
    calls = record_denoiser(pipe, family)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1.0
    pipe(**arguments_of(pipe, family), mask_image=mask, strength=strength, seed=0)
    grid = list(VP_GRID if family.is_vp else EVEN_GRID)
    seen = seen_timesteps(calls, family)
    assert len(seen) >= 1
    assert seen == pytest.approx(grid[-len(seen) :], rel=1e-6)


def test_strength_is_a_noise_level_not_a_share_of_the_steps() -> None:
    """A shifted grid keeps its low noise for weak edits: sigma .625 is the least it has."""
    scheduler = FewStepScheduler(flow_recipe("wan", FLOW_GRID))
    starts = [start_index(scheduler, strength) for strength in (0.3, 0.7, 0.85, 0.95, 1.0)]
    assert starts == [3, 3, 2, 1, 0]


@pytest.mark.parametrize("name", TASKS)
def test_insert_shows_the_network_exactly_the_strength_then_the_trained_tail(name: str) -> None:
    family, task = TASKS[name]
    pipe = made_for(family, task)
    calls = record_denoiser(pipe, family)
    pipe(**arguments_of(pipe, family), strength=0.6, strength_rule="insert", seed=0)
    tail = VP_GRID[2:] if family.is_vp else EVEN_GRID[2:]
    assert seen_timesteps(calls, family) == pytest.approx([600.0, *tail], rel=1e-6)
    pipe(**arguments_of(pipe, family), strength=0.6, seed=0)  # the grid is whole again
    assert seen_timesteps(calls[3:], family) == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("strength", [0.1, 0.6, 0.9])
def test_insert_adds_exactly_the_noise_of_the_strength(name: str, strength: float) -> None:
    family, task = TASKS[name]
    pipe = made_for(family, task)
    calls = record_denoiser(pipe, family)
    latents = torch.rand(1, *family.latent_shape)
    arguments = {**arguments_of(pipe, family), "image": latents}
    pipe(**arguments, strength=strength, strength_rule="insert", seed=8)
    noise = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(8))
    level = pipe.recipe.base.schedule.build().level(1000.0 * strength)
    torch.testing.assert_close(calls[0][2], level.alpha * latents + level.sigma * noise)


def test_only_pipelines_with_a_strength_take_a_rule() -> None:
    pipe = made_for(SD3, diffusers.StableDiffusion3Img2ImgPipeline)
    assert "strength_rule" in inspect.signature(type(pipe).__call__).parameters
    with pytest.raises(PipelineError, match="strength_rule 'exact' is unknown"):
        pipe(**arguments_of(pipe, SD3), strength_rule="exact")
    plain = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    assert "strength_rule" not in inspect.signature(type(plain).__call__).parameters


def test_a_strength_out_of_range_is_an_error() -> None:
    with pytest.raises(PipelineError, match="strength must be 0 to 1, got 1.5"):
        start_index(FewStepScheduler(vp_recipe("sd15")), 1.5)
