"""FLUX.1: packed latents, pooled and sequence embeddings, an embedded guidance scale in dev."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.recipe import Guidance
from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout, pack, unpack
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings

DEFAULT_GUIDANCE = 3.5
SCHNELL_LENGTH = 256


@final
class FluxBackbone(PipelineBackbone):
    """`FluxPipeline`.

    Dev was distilled from a guided model: the scale is an input of the network, the same one for
    teacher, student and critic, and the recipe tells it to the student at inference. Schnell has
    no such input and takes 256 text tokens. Samples are (B, C, h, w); packing happens here only.
    """

    family = "flux"
    component = "transformer"
    lora_targets = (
        r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        r"\.(ff|ff_context)\.net\.",
        r"single_transformer_blocks\.\d+\.proj_(mlp|out)$",
    )

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        takes_guidance = pipe.transformer.config.guidance_embeds
        super().__init__(
            pipe,
            _layout(pipe),
            settings,
            default_length=512 if takes_guidance else SCHNELL_LENGTH,
            takes_guidance=takes_guidance,
        )
        self.max_sequence_length = self.text_length  # told at inference too: stock takes 512
        self.embedded_guidance: float | None = None
        if takes_guidance:
            chosen = settings.embedded_guidance
            self.embedded_guidance = DEFAULT_GUIDANCE if chosen is None else chosen
            self.guidance = Guidance(mode="embedded", scale=self.embedded_guidance)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "transformer_blocks", "single_transformer_blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_length
        )
        return Condition(sequence.to(self.dtype), pooled.to(self.dtype))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        height, width = sample.shape[-2:]
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full_like(timestep, self.embedded_guidance)
        tokens = network(
            hidden_states=pack(sample),
            timestep=timestep.to(sample.dtype) / 1000.0,  # rounded first, as stock does
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.sequence,
            txt_ids=sample.new_zeros(condition.sequence.shape[1], 3),
            img_ids=_places(height // 2, width // 2, sample),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of every token, shape (height * width, 3)."""
    places = like.new_zeros(height, width, 3)
    places[..., 1] = torch.arange(height, device=like.device)[:, None]
    places[..., 2] = torch.arange(width, device=like.device)[None, :]
    return places.reshape(height * width, 3)


def _layout(pipe: Any) -> LatentLayout:
    return LatentLayout(
        channels=pipe.transformer.config.in_channels // 4,
        height=pipe.default_sample_size,
        width=pipe.default_sample_size,
        factor=pipe.vae_scale_factor,
        patch=2,
    )
