"""Qwen-Image: packed latents, embeddings of a language model with their mask, renormed guidance."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.codecs import VideoCodec
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.guidance import norm_kept_guidance
from fewstep.trainer.backbones.latents import LatentLayout, pack, unpack
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings

NULL_PROMPT = " "
"""What the pipeline's documentation gives as the empty negative prompt."""


@final
class QwenImageBackbone(PipelineBackbone):
    """`QwenImagePipeline`. Samples are (B, C, h, w); packing happens here only."""

    family = "qwen-image"
    component = "transformer"
    codec = VideoCodec()
    combine = staticmethod(norm_kept_guidance)
    lora_targets = (
        r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        r"\.(img|txt)_mlp\.net\.",
    )

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, _layout(pipe), settings, default_length=512)
        if self.pipe.transformer.config.guidance_embeds:
            raise ConfigError(
                "this Qwen-Image has a guidance input, which no published one has; "
                "distil one without it"
            )

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "transformer_blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, mask = self.pipe.encode_prompt(
            [prompt or NULL_PROMPT for prompt in prompts],
            device=self.device,
            max_sequence_length=self.text_length,
        )
        if mask is None:  # stock says so where every token is real
            mask = torch.ones(sequence.shape[:2], device=sequence.device)
        return Condition(sequence.to(self.dtype), mask=mask.bool())

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        count, _, height, width = sample.shape
        mask = condition.mask
        if mask is not None and bool(mask.all()):
            mask = None  # as stock does: attention without a mask is faster
        tokens = network(
            hidden_states=pack(sample),
            timestep=timestep.to(sample.dtype) / 1000.0,  # rounded first, as stock does
            guidance=None,
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=condition.sequence,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _layout(pipe: Any) -> LatentLayout:
    return LatentLayout(
        channels=pipe.transformer.config.in_channels // 4,
        height=pipe.default_sample_size,
        width=pipe.default_sample_size,
        factor=pipe.vae_scale_factor,
        patch=2,
    )
