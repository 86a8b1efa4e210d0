"""Sana: a Gemma text encoder, linear attention, a deep compression autoencoder."""

from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.errors import ExportError
from fewstep.export.families.autoencoders import autoencoder_parts, spatial_factor
from fewstep.export.families.cross_attention import CrossAttention
from fewstep.export.families.family import (
    MASKED,
    ExportFamily,
    autoencoder_settings,
    part_of,
    square,
    stock_default,
)
from fewstep.export.families.language_models import language_model_part
from fewstep.export.families.linear_attention import LinearAttention
from fewstep.export.families.patches import SincosPatches
from fewstep.export.families.pixart import masked_transformer_part
from fewstep.export.families.stand_ins import processors, standing_in
from fewstep.export.part import Part


class _Transformer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patches = SincosPatches(model.patch_embed)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        blocks = self.model.transformer_blocks
        patches = standing_in(self.model.patch_embed, self.patches)
        own = processors([block.attn1 for block in blocks], LinearAttention())
        text = processors([block.attn2 for block in blocks], CrossAttention())
        with patches, own, text:
            found = self.model(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep.expand(hidden_states.shape[0]),
                return_dict=False,
            )[0]
        return found[:, : self.model.config.in_channels]


def sana_transformer_part(name: str, model: Any) -> Part:
    """The transformer; its timestep is the schedule's times the configuration's timestep_scale.

    Raises:
        ExportError: It is told a guidance scale, which SanaPipeline's are not.
    """
    if model.config.guidance_embeds:
        raise ExportError(
            "this Sana is told its guidance scale (SANA-Sprint), which is not exported; use the "
            "pipeline"
        )
    return masked_transformer_part(name, _Transformer(model), model)


class Sana(ExportFamily):
    """Prompts behind an instruction, of which the network does not see the states."""

    name: ClassVar[str] = "sana"
    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    not_fused: ClassVar[str] = MASKED

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        encoder = part_of(pipe, "text_encoder")
        return (
            language_model_part("text_encoder", encoder, layer=-1, config=encoder.config),
            sana_transformer_part("transformer", pipe.transformer),
            *autoencoder_parts(pipe.vae),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        config = pipe.transformer.config
        return {
            **autoencoder_settings(pipe.vae, spatial_factor(pipe.vae)),
            "sample_size": square(config.sample_size),
            "patch_size": config.patch_size,
            "timestep_scale": config.timestep_scale,
            "max_sequence_length": stock_default(pipe, "max_sequence_length"),
        }

    def texts(self, pipe: Any) -> dict[str, str]:
        return {"before": "\n".join(stock_default(pipe, "complex_human_instruction"))}
