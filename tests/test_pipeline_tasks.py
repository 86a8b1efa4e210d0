"""Image to image, inpainting, ControlNet and IP-Adapter against the formula of a step."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Sampler
from tests.tiny.families import FLUX, SD3, SD15, SDXL
from tests.tiny.family import TinyFamily
from tests.tiny.tasks import (
    SD3_DEEP,
    SD3_WIDE,
    Call,
    add_ip_adapter,
    arguments_of,
    build_controlnet,
    euler,
    half_mask,
    made_for,
    picture,
    recipe_for,
    task_pipeline,
    trace,
)

CONTROLNET: dict[str, tuple[TinyFamily, Any]] = {
    "sd15": (SD15, diffusers.StableDiffusionControlNetPipeline),
    "sd15 img2img": (SD15, diffusers.StableDiffusionControlNetImg2ImgPipeline),
    "sd15 inpaint": (SD15, diffusers.StableDiffusionControlNetInpaintPipeline),
    "sdxl": (SDXL, diffusers.StableDiffusionXLControlNetPipeline),
    "sdxl img2img": (SDXL, diffusers.StableDiffusionXLControlNetImg2ImgPipeline),
    "sdxl inpaint": (SDXL, diffusers.StableDiffusionXLControlNetInpaintPipeline),
    "sd3": (SD3_DEEP, diffusers.StableDiffusion3ControlNetPipeline),
    "sd3 inpaint": (SD3_DEEP, diffusers.StableDiffusion3ControlNetInpaintingPipeline),
    "flux": (FLUX, diffusers.FluxControlNetPipeline),
    "flux img2img": (FLUX, diffusers.FluxControlNetImg2ImgPipeline),
    "flux inpaint": (FLUX, diffusers.FluxControlNetInpaintPipeline),
}
INPAINT: dict[str, tuple[TinyFamily, Any]] = {
    "sd15": (SD15, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (SDXL, diffusers.StableDiffusionXLInpaintPipeline),
    "sd3": (SD3_WIDE, diffusers.StableDiffusion3InpaintPipeline),
    "flux": (FLUX, diffusers.FluxInpaintPipeline),
}
IP_ADAPTER: dict[str, tuple[TinyFamily, Any]] = {
    "sd15": (SD15, diffusers.StableDiffusionPipeline),
    "sd15 img2img": (SD15, diffusers.StableDiffusionImg2ImgPipeline),
    "sdxl": (SDXL, diffusers.StableDiffusionXLPipeline),
    "sdxl inpaint": (SDXL, diffusers.StableDiffusionXLInpaintPipeline),
    "sd3": (SD3, diffusers.StableDiffusion3Pipeline),
    "flux": (FLUX, diffusers.FluxPipeline),
}


def assert_follows_the_grid(pipe: FewStepPipeline, calls: list[Call], end: Tensor) -> None:
    """Each sample the denoiser saw is the step from the one before, and so is the result."""
    scheduler: Any = pipe.scheduler
    levels = scheduler.levels[len(scheduler.levels) - len(calls) - 1 :]
    samples = [*(call.sample for call in calls[1:]), end]
    for call, following, (now, after) in zip(calls, samples, pairwise(levels), strict=True):
        expected = euler(pipe.recipe, call, now, after)
        torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-4)


def packed(like: Tensor, latents: Tensor) -> Tensor:
    """Latents as FLUX packs them, where it does."""
    if like.ndim == 4:
        return latents
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def draw(pipe: FewStepPipeline, arguments: dict[str, Any], **kwargs: Any) -> Tensor:
    return pipe(**{**arguments, "seed": 3, **kwargs})[0]


def keep_latents(pipe: Any) -> list[tuple[Tensor, ...]]:
    """What `prepare_latents` gives: first sample, noise, latents of the picture."""
    made: list[tuple[Tensor, ...]] = []
    prepare = pipe.prepare_latents

    def keep(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        made.append(prepare(*args, **kwargs))
        return made[-1]

    pipe.prepare_latents = keep
    return made


@pytest.mark.parametrize("rule", ["snap", "insert"])
@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("name", INPAINT)
def test_inpainting_blends_at_the_noise_of_the_sample_and_keeps_what_is_not_masked(
    name: str, strength: float, rule: str
) -> None:
    """Every blended sample is `(1 - m) (alpha' x + sigma' noise) + m step`, at its own sigma."""
    family, task = INPAINT[name]
    pipe = made_for(family, task)
    calls, made = trace(pipe.components[family.denoisers[0]]), keep_latents(pipe)
    arguments = arguments_of(pipe, family, mask_image=half_mask())
    result = draw(pipe, arguments, strength=strength, strength_rule=rule)
    _, noise, x, *_ = made[0]
    scheduler: Any = pipe.scheduler
    levels = scheduler.levels[len(scheduler.levels) - len(calls) - 1 :]
    assert [call.timestep * (1000.0 if name == "flux" else 1.0) for call in calls] == (
        pytest.approx([level.timestep for level in levels[:-1]])
    )
    if strength < 1.0 or name == "flux":
        first = levels[0].alpha * x + levels[0].sigma * noise
        torch.testing.assert_close(calls[0].sample, first, rtol=1e-5, atol=1e-6)
    mask = packed(result, half_mask()[:, :, ::2, ::2].expand(1, family.latent_shape[0], -1, -1))
    samples = [*(call.sample for call in calls[1:]), result]
    for call, following, (now, after) in zip(calls, samples, pairwise(levels), strict=True):
        known = after.alpha * x + after.sigma * noise
        expected = (1 - mask) * known + mask * euler(pipe.recipe, call, now, after)
        torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-4)
    outside = (mask == 0.0).expand_as(result)
    assert torch.equal(result[outside], x[outside])
    assert not torch.allclose(result[~outside], x[~outside], atol=0.05)


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("name", CONTROLNET)
def test_a_controlnet_runs_once_per_trained_timestep_on_the_denoisers_sample(name: str) -> None:
    family, task = CONTROLNET[name]
    is_sd3_inpaint = name == "sd3 inpaint"
    net = build_controlnet(family, extra_channels=1 if is_sd3_inpaint else 0)
    stock_pipe = task_pipeline(family, task, controlnet=net)
    pipe = FewStepPipeline.wrap(stock_pipe, recipe=recipe_for(family))
    calls, control_calls = trace(pipe.components[family.denoisers[0]]), trace(net)
    arguments = arguments_of(
        pipe,
        family,
        control_image=picture(2),
        mask_image=half_mask(),
        control_mask=half_mask(),
        strength=0.6,
    )
    result = draw(pipe, arguments)
    starts = 2 if "strength" in arguments else 4
    assert len(calls) == len(control_calls) == starts
    for call, control in zip(calls, control_calls, strict=True):
        assert torch.equal(control.sample, call.sample)
        assert control.timestep == pytest.approx(call.timestep)
    if "mask_image" not in arguments:  # with a mask the blend comes between; see above
        assert_follows_the_grid(pipe, calls, result)
    without = draw(pipe, arguments, controlnet_conditioning_scale=0.0)
    assert not torch.allclose(result, without, atol=1e-3)


@pytest.mark.parametrize("name", IP_ADAPTER)
def test_an_ip_adapter_reaches_every_step_and_the_grid_stays(name: str) -> None:
    family, task = IP_ADAPTER[name]
    pipe = made_for(family, task)
    embeds = add_ip_adapter(family, pipe)
    calls = trace(pipe.components[family.denoisers[0]])
    images: Any = embeds if family is SD3 else [embeds]
    other: Any = -embeds if family is SD3 else [-embeds]
    arguments = arguments_of(pipe, family, mask_image=half_mask(), strength=1.0)
    result = draw(pipe, arguments, ip_adapter_image_embeds=images)
    assert len(calls) == 4
    assert all(len(call.sample) == 1 for call in calls)  # not doubled for guidance
    if "mask_image" not in arguments:
        assert_follows_the_grid(pipe, calls, result)
    outputs = [call.output for call in calls]
    draw(pipe, arguments, ip_adapter_image_embeds=other)
    for before, after in zip(outputs, calls[4:], strict=True):
        assert not torch.allclose(before, after.output, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_inpainting_with_fresh_noise_repeats_for_the_same_seed(name: str) -> None:
    family, task = INPAINT[name]
    pipe = made_for(family, task, sampler=Sampler(stochasticity=1.0))
    arguments = arguments_of(pipe, family, mask_image=half_mask(), strength=1.0)
    first, again, other = (draw(pipe, arguments, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inpainting_from_pure_noise_scales_it_to_a_start_below_full_noise() -> None:
    """Stock flow pipelines begin with unit noise at strength 1, wherever the grid begins."""
    recipe = SD3_WIDE.recipe(timesteps=(800.0, 400.0))
    pipe = made_for(SD3_WIDE, diffusers.StableDiffusion3InpaintPipeline, recipe=recipe)
    calls, made = trace(pipe.components["transformer"]), keep_latents(pipe)
    draw(pipe, arguments_of(pipe, SD3_WIDE, mask_image=half_mask()), strength=1.0)
    assert len(calls) == 2
    torch.testing.assert_close(calls[0].sample, 0.8 * made[0][1])


def test_what_a_diffusers_class_has_no_argument_for_is_one_sentence() -> None:
    pipe = made_for(FLUX, diffusers.FluxControlNetImg2ImgPipeline)
    with pytest.raises(PipelineError, match="takes no ip_adapter_image; drop it"):
        pipe(**arguments_of(pipe, FLUX), ip_adapter_image=picture())
