"""Stable Diffusion 1.x and 2.x: UNet, epsilon or v, sequence embeddings."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings

SD2_TEXT_WIDTH = 1024


@final
class SdBackbone(PipelineBackbone):
    """`StableDiffusionPipeline`."""

    component = "unet"
    lora_targets = (
        r"attn\d?\.(to_[qkv]|to_out\.0)$",
        r"\.ff\.net\.",
        r"time_emb_proj$",
        r"resnets\.\d+\.conv[12]$",
    )

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, unet_layout(pipe), settings, default_length=0)
        width = self.pipe.unet.config.cross_attention_dim
        self.family = "sd2" if width == SD2_TEXT_WIDTH else "sd15"

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return unet_feature_layers(self.denoiser)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return Condition(sequence.to(self.dtype))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        return network(sample, timestep, condition.sequence, return_dict=False)[0]


def unet_layout(pipe: Any) -> LatentLayout:
    """Sizes of a UNet's latents."""
    config = pipe.unet.config
    return LatentLayout(
        channels=config.in_channels,
        height=config.sample_size,
        width=config.sample_size,
        factor=pipe.vae_scale_factor,
    )


def unet_feature_layers(unet: nn.Module) -> tuple[str, ...]:
    """Down blocks, then the middle block: DMD2's discriminator reads the last one."""
    names = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]  # pyright: ignore
    return (*names, *(["mid_block"] if unet.mid_block is not None else []))
