"""Wan 2.1 (one transformer) and Wan 2.2 (two, by noise): text to video, flow."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.adapters.expert_tags import HIGH, LOW
from fewstep.errors import ConfigError
from fewstep.recipe import Expert
from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.codecs import VideoCodec
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings
from fewstep.trainer.backbones.two_networks import TwoNetworks

OWN_HEIGHT_PX, OWN_WIDTH_PX, OWN_FRAMES = 480, 832, 81
"""What the pipeline draws without being asked."""


@final
class WanBackbone(PipelineBackbone):
    """`WanPipeline`. Samples are (B, C, frames, h, w).

    Wan 2.2 A14B has a network for high noise and one for low noise. Both are the denoiser: a
    sample's timestep decides which one answers, adapters are put on both, and their tensors are
    saved per component (`by_component`) as the recipe's `experts`. In a batch on one side of the
    boundary the other network does not run: its adapter gets no gradient and its feature layers
    say nothing.
    """

    family = "wan"
    component = "transformer"
    codec = VideoCodec()
    lora_targets = (r"\.attn\d\.(to_[qkv]|to_out\.0)$", r"\.ffn\.net\.")

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, _layout(pipe), settings, default_length=512)
        ratio = self.pipe.config.boundary_ratio
        self._denoiser: nn.Module = self.pipe.transformer
        if ratio is not None:
            total = self._facts.schedule.num_train_timesteps
            self._denoiser = TwoNetworks(
                self.pipe.transformer, self.pipe.transformer_2, ratio * total
            )
            self.experts = (
                Expert(adapter=HIGH, sigma_high=1.0, sigma_low=ratio, component="transformer"),
                Expert(adapter=LOW, sigma_high=ratio, sigma_low=0.0, component="transformer_2"),
            )

    @property
    def denoiser(self) -> nn.Module:
        return self._denoiser

    @property
    def feature_layers(self) -> tuple[str, ...]:
        if not self.experts:
            return block_paths(self.denoiser, "blocks")
        return block_paths(self.denoiser, "transformer.blocks", "transformer_2.blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,  # a call takes 512, encode_prompt alone 226
            device=self.device,
        )
        return Condition(sequence.to(self.dtype))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        if self.pipe.config.expand_timesteps:  # Wan 2.2 5B: a time for every token
            patches = self.pipe.transformer.config.patch_size
            sizes = [side // p for side, p in zip(sample.shape[2:], patches, strict=True)]
            timestep = timestep[:, None].expand(-1, sizes[0] * sizes[1] * sizes[2])
        return network(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=condition.sequence,
            return_dict=False,
        )[0]


def _layout(pipe: Any) -> LatentLayout:
    networks = (pipe.transformer, pipe.transformer_2)
    if networks[0] is None or (pipe.config.boundary_ratio is not None and networks[1] is None):
        raise ConfigError(
            "this Wan pipeline was loaded without one of its transformers; load all of them"
        )
    factor, frame_factor = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    return LatentLayout(
        channels=networks[0].config.in_channels,
        height=OWN_HEIGHT_PX // factor,
        width=OWN_WIDTH_PX // factor,
        factor=factor,
        patch=networks[0].config.patch_size[1],
        frames=(OWN_FRAMES - 1) // frame_factor + 1,
        frame_factor=frame_factor,
    )
