"""PixArt-alpha and -sigma: VP with linear betas, T5 with its mask, a learned variance."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings

TEXT_LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


@final
class PixArtBackbone(PipelineBackbone):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`.

    Networks made for 1024 px with additional conditions are told resolution and aspect ratio.
    """

    family = "pixart"
    component = "transformer"
    lora_targets = (r"\.attn\d\.(to_[qkv]|to_out\.0)$", r"\.ff\.net\.")

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        length = TEXT_LENGTHS[type(pipe).__name__]
        super().__init__(pipe, _layout(pipe), settings, default_length=length)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "transformer_blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        sequence, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            False,
            device=self.device,
            # stock asks for clean captions in every call, and warns where these are missing
            clean_caption=is_bs4_available() and is_ftfy_available(),
            max_sequence_length=self.text_length,
        )
        return Condition(sequence.to(self.dtype), mask=mask.bool())

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        output = network(
            sample,
            encoder_hidden_states=condition.sequence,
            encoder_attention_mask=condition.mask,
            timestep=timestep,
            added_cond_kwargs=self._size_of(sample),
            return_dict=False,
        )[0]
        return output[:, : sample.shape[1]]  # the rest is the learned variance

    def _size_of(self, sample: Tensor) -> dict[str, Tensor | None]:
        """Resolution (B, 2) and aspect ratio (B, 1) as stock tells them, or nothing."""
        if not self.pipe.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (float(side * self.layout.factor) for side in sample.shape[-2:])
        count = len(sample)
        return {
            "resolution": sample.new_tensor([height, width]).expand(count, -1),
            "aspect_ratio": sample.new_tensor([height / width]).expand(count, -1),
        }


def _layout(pipe: Any) -> LatentLayout:
    config = pipe.transformer.config
    return LatentLayout(
        channels=config.in_channels,
        height=config.sample_size,
        width=config.sample_size,
        factor=pipe.vae_scale_factor,
        patch=config.patch_size,
    )
