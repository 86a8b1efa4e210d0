"""The model's edge: a diffusers pipeline as losses and rollouts see it, x0 = denoise(sample).

Epsilon, v and flow outputs, timestep scaling, precision, packing, text encoding and guidance are
dealt with here, once. One class per family in the files beside this one.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from fewstep.adapters import Component
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.recipe import Base, Expert, Guidance
from fewstep.sampling import Prediction, to_x0
from fewstep.trainer.backbones.codecs import Codec, ImageCodec
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.guidance import Combination, plain_guidance
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.levels import Levels
from fewstep.trainer.roles import Role, acting_as


class Backbone(ABC):
    """Interface: one pipeline's denoiser, text encoders and decoder.

    Args:
        pipe: A loaded stock pipeline.
        schedule: Its noise schedule.
        prediction: What its denoiser predicts.
        max_sequence_length: Text tokens for pipelines that take it; 0 for their default.

    Attributes:
        family: As recipes spell it.
        component: Of the pipeline, where the denoiser is; the first one where there are two.
        layout: Sizes of latents.
        lora_targets: Regular expressions of the layers that an adapter of this family is put on.
        codec: Latents to pictures and back.
        combine: (cond x0, uncond x0, scale, sample) -> guided x0, as the pipeline guides.
        guidance: How a distilled student is guided at inference: not at all, unless a scale is
            embedded.
        experts: Networks with an interval of noise each (Wan 2.2), noisiest first, as a recipe
            names them; module paths of the denoiser then begin with their component.
        own_networks: Networks of roles that are not adapters on the base (full copies, smaller
            students), by role name.
        evaluations: Network evaluations so far, samples times calls, by role name; guidance counts
            its two halves.
        in_step: Whether several processes hold the denoiser together: then all must make the same
            calls in the same order, so a call that some need is made by all.
    """

    family: str
    component: Component
    layout: LatentLayout
    lora_targets: tuple[str, ...]
    codec: Codec = ImageCodec()
    combine: Combination = staticmethod(plain_guidance)
    guidance: Guidance = Guidance()
    experts: tuple[Expert, ...] = ()
    in_step: bool = False

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
        self.own_networks: dict[str, nn.Module] = {}
        self.evaluations: Counter[str] = Counter()

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that gets the adapters."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Condition:
        """Embeddings of prompts; "" gives the null condition."""

    @abstractmethod
    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        """A denoiser's raw output.

        Args:
            network: The base, or a role's own network of the same call signature.
            sample: Shape (B, C, h, w), or (B, C, frames, h, w) for video; the base's dtype.
            timestep: Shape (B,), the schedule's clock: 0 to 1000, of twins -1000 to 0.
            condition: B rows.

        Returns:
            The shape of `sample`.
        """

    @abstractmethod
    def base(self, model_id: str) -> Base:
        """What a recipe says of this base."""

    @property
    @abstractmethod
    def feature_layers(self) -> tuple[str, ...]:
        """Module paths, shallow to deep, whose outputs a discriminator or feature loss may read."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return dtype_of(self.denoiser)

    def latent_shape(
        self, height_px: int = 0, width_px: int = 0, num_frames: int = 0
    ) -> tuple[int, ...]:
        """(C, h, w), with frames (C, frames, h, w); 0 is the model's own (`LatentLayout.shape`)."""
        return self.layout.shape(height_px, width_px, num_frames)

    def by_component(self, tensors: Mapping[str, Tensor]) -> dict[Component, dict[str, Tensor]]:
        """A role's tensors by pipeline component, named as in that component's own network.

        Args:
            tensors: By path in the denoiser.
        """
        if not self.experts:
            return {self.component: dict(tensors)}
        parts: dict[Component, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            component, _, rest = name.partition(".")
            parts.setdefault(component, {})[rest] = tensor  # pyright: ignore[reportArgumentType]
        return parts

    def network(self, role: Role) -> nn.Module:
        """The network a role speaks through: its own, or the base."""
        return self.own_networks.get(role.name, self.denoiser)

    def x0(self, role: Role, sample: Tensor, levels: Levels, condition: Condition) -> Tensor:
        """Predicted clean latents under a role, float32, shape of `sample`."""
        self.evaluations[role.name] += len(sample)
        network = self.network(role)
        dtype = dtype_of(network)  # a role's own network is float32 on any base
        with acting_as(role):
            clock = role.clock * levels.timestep
            output = self.output(network, sample.to(dtype), clock, condition.cast(dtype))
        return to_x0(self.prediction, output.float(), sample.float(), levels.like(sample))

    def both_x0(
        self,
        role: Role,
        sample: Tensor,
        levels: Levels,
        condition: Condition,
        null_condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """(cond, uncond) x0 in one call; `null_condition` is one row."""
        both = condition.beside(null_condition.expand(len(sample)))
        repeats = (2,) + (1,) * (sample.ndim - 1)
        cond, uncond = self.x0(role, sample.repeat(repeats), levels.twice(), both).chunk(2)
        return cond, uncond

    def guided_x0(
        self,
        role: Role,
        sample: Tensor,
        levels: Levels,
        condition: Condition,
        null_condition: Condition,
        scale: float,
    ) -> Tensor:
        """x0 under guidance, put together as the pipeline does; 1 is the conditional call only."""
        if scale == 1.0:
            return self.x0(role, sample, levels, condition)
        cond, uncond = self.both_x0(role, sample, levels, condition, null_condition)
        return self.combine(cond, uncond, scale, sample.float())

    def decode_float(self, latents: Tensor) -> Tensor:
        """Pictures of latents in 0 to 1, float32; differentiable.

        Shape (B, 3, H, W), of clips (B, 3, frames, H, W).
        """
        images = self.codec.decode(self.pipe.vae, latents)
        return (images.float() / 2.0 + 0.5).clamp(0.0, 1.0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents: uint8, shape (B, H, W, 3) or (B, frames, H, W, 3), on the CPU."""
        images = self.decode_float(latents) * 255.0
        return images.round().to(torch.uint8).movedim(1, -1).cpu()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of pictures.

        Args:
            images: Shape (B, 3, H, W), of clips (B, 3, frames, H, W); 0 to 1.

        Returns:
            Shape (B, C, h, w) or (B, C, frames, h, w), float32, in the denoiser's own scale; the
            mean, not a sample.
        """
        return self.codec.encode(self.pipe.vae, images * 2.0 - 1.0)

    def level_batch(self, level: Level, batch_size: int) -> Levels:
        """One level for a whole batch, on the denoiser's device."""
        return Levels.full(level, batch_size, self.device)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The precision a network takes its sample in; norms and tables may be kept wider."""
    model: Any = next((m for m in network.modules() if isinstance(m, ModelMixin)), None)
    kept = () if model is None else model._keep_in_fp32_modules or ()  # by name, as diffusers does
    for name, parameter in (model or network).named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            return parameter.dtype
    raise AssertionError("a denoiser has weights")


def block_paths(network: nn.Module, *lists: str) -> tuple[str, ...]:
    """Module paths of the blocks in some lists of a network, list after list."""
    paths: list[str] = []
    for name in lists:
        blocks = network.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        paths += [f"{name}.{index}" for index in range(len(blocks))]
    return tuple(paths)
