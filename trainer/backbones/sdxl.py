"""Stable Diffusion XL: UNet, epsilon or v, pooled embeddings and the picture's size."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings
from fewstep.trainer.backbones.stable_diffusion import unet_feature_layers, unet_layout


@final
class SdxlBackbone(PipelineBackbone):
    """`StableDiffusionXLPipeline`.

    The layers that get adapters are those of DMD2's and LCM-LoRA's SDXL files.
    """

    family = "sdxl"
    component = "unet"
    lora_targets = (
        r"attn\d\.(to_[qkv]|to_out\.0)$",
        r"\.ff\.net\.",
        r"attentions\.\d+\.proj_(in|out)$",
        r"resnets\.\d+\.(conv[12]|conv_shortcut|time_emb_proj)$",
        r"(down|up)samplers\.0\.conv$",
    )

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, unet_layout(pipe), settings, default_length=0)
        vae: Any = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # it overflows in float16; stock does so in every call

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return unet_feature_layers(self.denoiser)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = [index for index, prompt in enumerate(prompts) if not prompt]
            sequence, pooled = sequence.clone(), pooled.clone()
            sequence[empty], pooled[empty] = 0.0, 0.0
        return Condition(sequence.to(self.dtype), pooled.to(self.dtype))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        added = {"text_embeds": condition.pooled, "time_ids": self._size_of(sample)}
        return network(
            sample, timestep, condition.sequence, added_cond_kwargs=added, return_dict=False
        )[0]

    def _size_of(self, sample: Tensor) -> Tensor:
        """What stock says of a picture drawn at its own size: (B, 6), no crop."""
        height, width = (side * self.layout.factor for side in sample.shape[-2:])
        ids = [height, width, 0, 0, height, width]
        return sample.new_tensor(ids).expand(len(sample), -1)
