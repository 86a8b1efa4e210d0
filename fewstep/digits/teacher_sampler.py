"""Samples a digits teacher at any step count: the baseline that a student is measured against.

Plain Euler (flow) or DDIM (epsilon) steps through `fewstep.sampling.step`, independent of
FewStepPipeline and of diffusers' schedulers. Knows nothing of students or scores.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from rich.progress import Progress
from torch import Tensor, nn

from fewstep.digits.draw import BATCH_SIZE, Drawn, generators, in_batches, to_uint8
from fewstep.digits.teachers import T5_LENGTH
from fewstep.errors import ConfigError, PipelineError
from fewstep.loading import load_stock_pipeline
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, Vp, levels_of
from fewstep.sampling import Prediction, step, to_x0

DigitsPipeline = StableDiffusion3Pipeline | StableDiffusionPipeline


def load_teacher(folder: Path | str) -> DigitsPipeline:
    """Load a digits teacher in float32 (the shipped files are float16).

    Raises:
        PipelineError: The folder does not hold one of the two kinds of digits teacher.
    """
    try:
        pipe = load_stock_pipeline(folder)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"{folder} could not be loaded as a diffusers pipeline ({error}); give a folder with a "
            "model_index.json"
        ) from error
    if not isinstance(pipe, DigitsPipeline):
        raise PipelineError(
            f"{folder} holds a {type(pipe).__name__}; wanted StableDiffusion3Pipeline or "
            "StableDiffusionPipeline"
        )
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.float()  # transformers keeps a file's float16, diffusers does not
    return pipe


def teacher_images(
    pipe: DigitsPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Drawn:
    """Draw with a teacher as well as plain Euler/DDIM steps can.

    The grid is evenly spaced from full noise down to clean data. diffusers' own grid for SD3
    ends with a step from sigma 0.001, which wastes one of few: this is the harder baseline.

    Args:
        pipe: From `load_teacher`.
        prompts: N prompts.
        seeds: N seeds.
        num_steps: Steps; each is two network evaluations unless guidance_scale is 1.
        guidance_scale: w in `uncond + w * (cond - uncond)` against the empty prompt; 1 = off.
        batch_size: Pictures per batch.
        progress: Where to show a bar.

    Raises:
        ConfigError: num_steps is below 1.
        PipelineError: The UNet does not predict epsilon.
        ShapeError: Prompts and seeds differ in number, or there are none.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be >= 1, got {num_steps}")

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        latents = teacher_latents(
            pipe, prompts, seeds, num_steps=num_steps, guidance_scale=guidance_scale
        )
        return _decode(pipe, latents)

    return in_batches(draw, prompts, seeds, batch_size, progress)


def nfe_of_teacher(num_steps: int, guidance_scale: float) -> int:
    """Network evaluations per image of `teacher_images`."""
    return num_steps if guidance_scale == 1.0 else 2 * num_steps


@torch.no_grad()
def teacher_latents(
    pipe: DigitsPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """What `teacher_images` decodes: latents, shape (N, C, h, w), float32."""
    schedule = schedule_of(pipe)
    timesteps = schedule.uniform_timesteps(num_steps)
    sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
    levels = levels_of(schedule, timesteps, sigmas)
    denoise = _guided_denoiser(pipe, prompts, guidance_scale)
    denoiser = pipe.transformer if isinstance(pipe, StableDiffusion3Pipeline) else pipe.unet
    shape = (denoiser.config.in_channels, *2 * (denoiser.config.sample_size,))
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators(seeds)])
    sample = noise.to(pipe.device) * levels[0].sigma
    for now, following in zip(levels, levels[1:], strict=False):
        sample = step(sample, denoise(sample, now), now, following, None, following)
    return sample


def schedule_of(pipe: DigitsPipeline) -> NoiseSchedule:
    """The noise schedule a digits teacher was trained on, from its scheduler's config.

    Raises:
        PipelineError: The UNet does not predict epsilon.
    """
    config = pipe.scheduler.config
    if isinstance(pipe, StableDiffusion3Pipeline):
        return Flow(config["shift"], config["num_train_timesteps"])
    if config["prediction_type"] != "epsilon":
        raise PipelineError(
            f"this teacher predicts {config['prediction_type']}; digits teachers predict epsilon"
        )
    return Vp(
        config["beta_start"],
        config["beta_end"],
        config["beta_schedule"],
        config["num_train_timesteps"],
    )


def _guided_denoiser(
    pipe: DigitsPipeline, prompts: list[str], guidance_scale: float
) -> Callable[[Tensor, Level], Tensor]:
    """x0 with guidance; both halves go through the network in one call."""
    is_guided = guidance_scale != 1.0
    asked = [*("" for _ in prompts), *prompts] if is_guided else prompts
    kind, output_of = _network(pipe, asked)

    def denoise(sample: Tensor, level: Level) -> Tensor:
        doubled = torch.cat([sample, sample]) if is_guided else sample
        timestep = torch.full((len(doubled),), level.timestep, device=sample.device)
        output = output_of(doubled, timestep)
        if is_guided:
            uncond, cond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)
        return to_x0(kind, output, sample, level)

    return denoise


def _network(
    pipe: Any, prompts: list[str]
) -> tuple[Prediction, Callable[[Tensor, Tensor], Tensor]]:
    """What the denoiser predicts, and its raw output for these prompts."""
    if isinstance(pipe, StableDiffusion3Pipeline):
        return "flow", _sd3_network(pipe, prompts)
    return "epsilon", _sd15_network(pipe, prompts)


def _sd3_network(pipe: Any, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    sequence, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return lambda sample, timestep: pipe.transformer(
        sample,
        timestep=timestep,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def _sd15_network(pipe: Any, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    sequence, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    return lambda sample, timestep: pipe.unet(sample, timestep, sequence, return_dict=False)[0]


def _decode(pipe: Any, latents: Tensor) -> np.ndarray:
    config = pipe.vae.config
    latents = latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return to_uint8(pipe.image_processor.postprocess(decoded, output_type="np"))
