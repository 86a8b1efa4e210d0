"""A GUIDER's network as the steps of a recipe see it, inpainting and odd clocks included."""

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from fewstep.comfy_nodes.model_steps import ModelStep
from fewstep.errors import AdapterError


@dataclass(frozen=True, slots=True)
class MaskedModel:
    """A GUIDER's network as a recipe's steps see it, with ComfyUI's own inpainting around it.

    Attributes:
        guider: (x, sigma) -> x0, with guidance.
        sigmas: Of the run.
        extra_args: model_options and seed.
        noise: Initial noise.
        latents: The picture, or zeros.
        mask: 1 where the picture is made.
        whole_noise: The step whose sample is noise alone, under the mask too: FewStepPipeline's
            inpainting begins so. None where there is no such step.
    """

    guider: Any
    sigmas: Tensor
    extra_args: dict[str, Any]
    noise: Tensor
    latents: Tensor
    mask: Tensor | None
    whole_noise: ModelStep | None

    def __call__(self, step: ModelStep, sample: Tensor) -> Tensor:
        """x0 at a step."""
        inner = self.guider if step.is_plain else ModelElsewhere(self.guider, step)
        masked = comfy.samplers.KSamplerX0Inpaint(inner, self.sigmas)
        masked.noise, masked.latent_image = self.noise, self.latents
        sigma = sample.new_full((sample.shape[0],), step.sigma)
        is_noise = step is self.whole_noise
        arguments = {**self.extra_args, "denoise_mask": None if is_noise else self.mask}
        x0 = masked(step.scale * sample, sigma, **arguments)
        return self.keep(x0) if is_noise else x0

    def keep(self, sample: Tensor) -> Tensor:
        """Clean data with the kept part of the picture as it was (TCD's is not quite clean)."""
        if self.mask is None or is_mask_moving(self.extra_args):
            return sample
        return sample * self.mask + self.latents * (1.0 - self.mask)


@dataclass(frozen=True, slots=True)
class ModelElsewhere:
    """A GUIDER called at another level than the sample's: NitroSD's clock, rounded timesteps.

    The network sees the sample unscaled all the same, and its answer is read where the recipe says.

    Attributes:
        guider: (x, sigma) -> x0.
        step: Where the sample is and what is told.
    """

    guider: Any
    step: ModelStep

    @property
    def inner_model(self) -> Any:
        """The BaseModel, as of a GUIDER."""
        return self.guider.inner_model

    def __call__(
        self, x: Tensor, sigma: Tensor, *, model_options: dict[str, Any], seed: int | None
    ) -> Tensor:
        """x0 at the step's level."""
        sample = x / self.step.scale
        told = torch.full_like(sigma, self.step.told_sigma)
        told_sample = self.step.told_scale * sample
        if self.step.clock is None:
            x0 = self.guider(told_sample, told, model_options=model_options, seed=seed)
        else:
            clock = Clock(self.step.clock)
            options = clock.set_in(model_options)
            x0 = self.guider(told_sample, told, model_options=options, seed=seed)
            clock.check()
        return self.step.of_sample * sample + self.step.of_x0 * x0


class Clock:
    """Tells a network a timestep that its MODEL has no sigma for.

    Args:
        timestep: What is told.
    """

    def __init__(self, timestep: float) -> None:
        self.timestep = timestep
        self.is_told = False

    def set_in(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of a run's options with this in it."""
        options = comfy.model_patcher.create_model_options_clone(model_options)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
            "few-step clock",
            self._tell,
            options,
            is_model_options=True,
        )
        return options

    def check(self) -> None:
        """Refuse a network that was not told.

        Raises:
            AdapterError: Networks of its class are called another way.
        """
        if not self.is_told:
            raise AdapterError(
                f"This recipe tells the network timestep {self.timestep:g}, which MODEL has no "
                "sigma for; sample it with fewstep's FewStepPipeline."
            )

    def _tell(self, execute: Any, sample: Tensor, timestep: Tensor, *rest: Any, **kw: Any) -> Any:
        self.is_told = True
        return execute(sample, torch.full_like(timestep, self.timestep), *rest, **kw)


def is_mask_moving(extra_args: dict[str, Any]) -> bool:
    """Whether a node changes the mask from step to step (Differential Diffusion)."""
    return "denoise_mask_function" in extra_args["model_options"]
