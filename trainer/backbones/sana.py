"""SANA: linear-attention transformer, flow, Gemma embeddings under an instruction."""

import inspect
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
class SanaBackbone(PipelineBackbone):
    """`SanaPipeline`.

    Prompts are encoded under the instruction that the pipeline puts before them in a call; the
    null condition is the empty prompt without it, as there.
    """

    family = "sana"
    component = "transformer"
    lora_targets = (r"\.attn\d\.(to_[qkv]|to_out\.0)$", r"\.ff\.conv_(inverted|point)$")

    def __init__(self, pipe: DiffusionPipeline, settings: EdgeSettings) -> None:
        super().__init__(pipe, _layout(pipe), settings, default_length=300)
        call: Any = type(self.pipe).__call__
        parameters = inspect.signature(call).parameters
        self._instruction: list[str] = parameters["complex_human_instruction"].default

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return block_paths(self.denoiser, "transformer_blocks")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        real = [index for index, prompt in enumerate(prompts) if prompt]
        empty = [index for index, prompt in enumerate(prompts) if not prompt]
        if not empty:
            return self._encode(prompts, self._instruction)
        null = self._encode([""], None).expand(len(empty))
        if not real:
            return null
        both = self._encode([prompts[index] for index in real], self._instruction).beside(null)
        return both.take(torch.tensor([*real, *empty]).argsort())

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Condition:
        sequence, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            False,
            device=self.device,
            max_sequence_length=self.text_length,
            complex_human_instruction=instruction,
        )
        return Condition(sequence.to(self.dtype), mask=mask.bool())

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        output = network(
            sample,
            encoder_hidden_states=condition.sequence,
            encoder_attention_mask=condition.mask,
            timestep=timestep * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : sample.shape[1]]  # the rest, if any, is a learned variance


def _layout(pipe: Any) -> LatentLayout:
    config = pipe.transformer.config
    return LatentLayout(
        channels=config.in_channels,
        height=config.sample_size,
        width=config.sample_size,
        factor=pipe.vae_scale_factor,
        patch=config.patch_size,
    )
