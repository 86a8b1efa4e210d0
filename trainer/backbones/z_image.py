"""Z-Image: lists of pictures and captions, time from noise 0 to data 1, velocity towards data."""

from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fewstep.trainer.backbones.backbone import block_paths
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.pipeline_backbone import PipelineBackbone
from fewstep.trainer.backbones.settings import EdgeSettings

OWN_SIZE_PX = 1024
"""What the pipeline draws without being asked."""


@final
class ZImageBackbone(PipelineBackbone):
    """`ZImagePipeline`.

    Where a picture's tokens are depends on the length of its caption, so each row is cut to its
    real tokens (the mask) before the network sees it.
    """

    family = "z-image"
    component = "transformer"
    lora_targets = (r"\.attention\.(to_[qkv]|to_out\.0)$", r"\.feed_forward\.w[123]$")

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, _layout(pipe), settings, default_length=512)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "layers")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        rows, _ = self.pipe.encode_prompt(
            list(prompts),  # stock writes the chat template into the list it is given
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        sequence = pad_sequence(rows, batch_first=True)
        places = torch.arange(sequence.shape[1], device=lengths.device)
        return Condition(sequence.to(self.dtype), mask=places[None, :] < lengths[:, None])

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        captions = list(condition.sequence.unbind())
        if condition.mask is not None:
            captions = [row[real] for row, real in zip(captions, condition.mask, strict=True)]
        pictures = network(
            list(sample.unsqueeze(2).unbind()),
            (1000.0 - timestep) / 1000.0,
            captions,
            return_dict=False,
        )[0]
        return -torch.stack(pictures).squeeze(2)


def _layout(pipe: Any) -> LatentLayout:
    side = OWN_SIZE_PX // pipe.vae_scale_factor
    return LatentLayout(
        channels=pipe.transformer.config.in_channels,
        height=side,
        width=side,
        factor=pipe.vae_scale_factor,
        patch=2,
    )
