"""The model's edge: a diffusers pipeline as losses and rollouts see it, x0 = denoise(sample).

Epsilon, v and flow outputs, timestep scaling, precision, text encoding and guidance are dealt with
here, once. One class per kind of pipeline; a stock `from_pretrained` does the loading.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor, nn

from fewstep.adapters import Component
from fewstep.errors import ConfigError
from fewstep.loading import load_stock_pipeline
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, Vp
from fewstep.recipe import Base, Schedule
from fewstep.sampling import Prediction, to_x0
from fewstep.trainer.levels import Levels
from fewstep.trainer.roles import Role, acting_as

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True, slots=True)
class Condition:
    """Prompt embeddings.

    Attributes:
        sequence: Shape (B, tokens, width).
        pooled: Shape (B, width), or None where the denoiser takes none.
    """

    sequence: Tensor
    pooled: Tensor | None

    def take(self, index: Tensor) -> "Condition":
        """The rows at `index`, shape (B,) of integers."""
        index = index.to(self.sequence.device)
        return Condition(self.sequence[index], None if self.pooled is None else self.pooled[index])

    def expand(self, batch_size: int) -> "Condition":
        """One row, repeated."""
        return self.take(torch.zeros(batch_size, dtype=torch.long))

    def beside(self, other: "Condition") -> "Condition":
        """This batch, then the other one."""
        if self.pooled is None or other.pooled is None:
            return Condition(torch.cat([self.sequence, other.sequence]), None)
        return Condition(
            torch.cat([self.sequence, other.sequence]), torch.cat([self.pooled, other.pooled])
        )


class Backbone(ABC):
    """Interface: one pipeline's denoiser, text encoders and decoder.

    Args:
        pipe: A loaded stock pipeline.
        schedule: Its noise schedule.
        prediction: What its denoiser predicts.
        max_sequence_length: Text tokens for pipelines that take it; 0 for their default.
    """

    family: str
    component: Component

    def __init__(
        self,
        pipe: DiffusionPipeline,
        schedule: NoiseSchedule,
        prediction: Prediction,
        max_sequence_length: int,
    ) -> None:
        self.pipe: Any = pipe
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.max_sequence_length = max_sequence_length

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that gets the adapters."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Condition:
        """Embeddings of prompts; "" gives the null condition."""

    @abstractmethod
    def output(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The denoiser's raw output for samples (B, C, h, w) at timesteps (B,)."""

    @abstractmethod
    def base(self, model_id: str) -> Base:
        """What a recipe says of this base."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return next(self.denoiser.parameters()).dtype

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a square image; 0 is the model's own size."""
        config: Any = self.denoiser.config
        side = size_px // self.pipe.vae_scale_factor if size_px else config.sample_size
        return (config.in_channels, side, side)

    def x0(self, role: Role, sample: Tensor, levels: Levels, condition: Condition) -> Tensor:
        """Predicted clean latents under a role, float32, shape of `sample`."""
        with acting_as(role):
            output = self.output(sample.to(self.dtype), levels.timestep, condition)
        return to_x0(self.prediction, output.float(), sample.float(), levels)

    def guided_x0(
        self,
        role: Role,
        sample: Tensor,
        levels: Levels,
        condition: Condition,
        null_condition: Condition,
        scale: float,
    ) -> Tensor:
        """`uncond + scale * (cond - uncond)` in x0, both halves in one call; 1 is one half only."""
        if scale == 1.0:
            return self.x0(role, sample, levels, condition)
        both = condition.beside(null_condition.expand(len(sample)))
        doubled = Levels(
            levels.timestep.repeat(2),
            levels.alpha.repeat(2, 1, 1, 1),
            levels.sigma.repeat(2, 1, 1, 1),
        )
        cond, uncond = self.x0(role, sample.repeat(2, 1, 1, 1), doubled, both).chunk(2)
        return uncond + scale * (cond - uncond)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents: uint8, shape (B, H, W, 3), on the CPU."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        shift = vae.config.get("shift_factor")
        images = vae.decode(latents + shift if shift else latents, return_dict=False)[0]
        images = (images.float() / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def level_batch(self, level: Level, batch_size: int) -> Levels:
        """One level for a whole batch, on the denoiser's device."""
        return Levels.full(level, batch_size, self.device)


class Sd3Backbone(Backbone):
    """StableDiffusion3Pipeline: MMDiT, flow velocity, pooled and sequence embeddings."""

    family = "sd3"
    component = "transformer"

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        length = (
            {"max_sequence_length": self.max_sequence_length} if self.max_sequence_length else {}
        )
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, device=self.device, **length
        )
        return Condition(sequence.to(self.dtype), pooled.to(self.dtype))

    def output(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(
            sample,
            encoder_hidden_states=condition.sequence,
            pooled_projections=condition.pooled,
            timestep=timestep,
            return_dict=False,
        )[0]

    def base(self, model_id: str) -> Base:
        return Base(
            family=self.family,
            model_id=model_id,
            prediction="flow",
            schedule=Schedule(kind="flow", shift=1.0),
            max_sequence_length=self.max_sequence_length or None,
        )


class SdBackbone(Backbone):
    """StableDiffusionPipeline: UNet, epsilon or v, sequence embeddings."""

    family = "sd15"
    component = "unet"

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return Condition(sequence.to(self.dtype), None)

    def output(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(sample, timestep, condition.sequence, return_dict=False)[0]

    def base(self, model_id: str) -> Base:
        schedule = self.schedule
        assert isinstance(schedule, Vp)
        return Base(
            family=self.family,
            model_id=model_id,
            prediction=self.prediction,
            schedule=Schedule(
                kind="vp",
                num_train_timesteps=schedule.num_train_timesteps,
                beta_schedule=schedule.beta_schedule,
                beta_start=schedule.beta_start,
                beta_end=schedule.beta_end,
            ),
        )


def load_backbone(
    model: str, *, precision: torch.dtype, device: torch.device, max_sequence_length: int
) -> Backbone:
    """Load a pipeline from a folder or the hub and wrap it for training.

    Raises:
        ConfigError: The folder is no diffusers pipeline, or of a kind not supported yet.
    """
    try:
        pipe = load_stock_pipeline(model, dtype=precision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model} could not be loaded as a diffusers pipeline ({error}); give a folder with a "
            "model_index.json, a hub id, digits-sd3 or digits-sd15"
        ) from error
    pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return wrap_pipeline(pipe, max_sequence_length=max_sequence_length)


def wrap_pipeline(pipe: DiffusionPipeline, *, max_sequence_length: int = 0) -> Backbone:
    """The backbone of a loaded pipeline.

    Raises:
        ConfigError: No backbone for this pipeline class.
    """
    if isinstance(pipe, StableDiffusion3Pipeline):
        return Sd3Backbone(pipe, Flow(), "flow", max_sequence_length)
    if isinstance(pipe, StableDiffusionPipeline):
        config = pipe.scheduler.config
        schedule = Vp(
            config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps
        )
        return SdBackbone(pipe, schedule, PREDICTIONS[config.prediction_type], 0)
    raise ConfigError(
        f"{type(pipe).__name__} cannot be distilled yet; this release trains "
        "StableDiffusion3Pipeline and StableDiffusionPipeline"
    )
