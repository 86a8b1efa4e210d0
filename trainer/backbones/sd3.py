"""Stable Diffusion 3 and 3.5: MMDiT, flow velocity, pooled and sequence embeddings."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings


@final
class Sd3Backbone(PipelineBackbone):
    """`StableDiffusion3Pipeline`."""

    family = "sd3"
    component = "transformer"
    lora_targets = (
        r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        r"\.(ff|ff_context)\.net\.",
    )

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, _layout(pipe), settings, default_length=256)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "transformer_blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_length,
        )
        return Condition(sequence.to(self.dtype), pooled.to(self.dtype))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        return network(
            sample,
            encoder_hidden_states=condition.sequence,
            pooled_projections=condition.pooled,
            timestep=timestep,
            return_dict=False,
        )[0]


def _layout(pipe: Any) -> LatentLayout:
    config = pipe.transformer.config
    return LatentLayout(
        channels=config.in_channels,
        height=config.sample_size,
        width=config.sample_size,
        factor=pipe.vae_scale_factor,
        patch=config.patch_size,
    )
