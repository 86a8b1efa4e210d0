"""PixArt-Alpha and PixArt-Sigma."""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

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
from fewstep.export.families.patches import SincosPatches
from fewstep.export.families.stand_ins import processors
from fewstep.export.families.text_encoders import masked_t5_part
from fewstep.export.part import Part, Port

HIDDEN = -10000.0
"""Added to the scores of text tokens that are not there, as stock networks do."""


class _Transformer(nn.Module):
    """Without the learned variance, which no few-step sampler reads.

    The stock forward squeezes the tokens' axis, which a traced graph would do in earnest.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patches = SincosPatches(model.pos_embed)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        missing = {"resolution": None, "aspect_ratio": None}
        return self._answer(
            hidden_states, encoder_hidden_states, encoder_attention_mask, timestep, missing
        )

    def _answer(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        added: dict[str, Any],
    ) -> Tensor:
        model, batch = self.model, hidden_states.shape[0]
        patch = model.config.patch_size
        rows, columns = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        tokens = self.patches(hidden_states)
        told, embedded = model.adaln_single(
            timestep.expand(batch), added, batch_size=batch, hidden_dtype=tokens.dtype
        )
        text = model.caption_projection(encoder_hidden_states)
        hidden = (1 - encoder_attention_mask.to(tokens.dtype))[:, None] * HIDDEN
        with processors([block.attn2 for block in model.transformer_blocks], CrossAttention()):
            for block in model.transformer_blocks:
                tokens = block(
                    tokens,
                    encoder_hidden_states=text,
                    encoder_attention_mask=hidden,
                    timestep=told,
                )
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        found = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)
        grid = found.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        pixels = grid.reshape(batch, -1, rows * patch, columns * patch)
        return pixels[:, : model.config.in_channels]


class _SizedTransformer(_Transformer):
    """Told the picture's size (PixArt-Alpha at 1024 pixels)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        resolution: Tensor,
        aspect_ratio: Tensor,
    ) -> Tensor:
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return self._answer(
            hidden_states, encoder_hidden_states, encoder_attention_mask, timestep, added
        )


def masked_transformer_part(name: str, module: nn.Module, model: Any) -> Part:
    """A transformer over latents with a masked text beside, as PixArt and Sana have it.

    Args:
        name: Of the part.
        module: What is traced.
        model: The stock network.
    """
    config = model.config
    patch, channels = config.patch_size, str(config.in_channels)
    latent = ("batch_size", channels, "height", "width")
    return Part(
        name=name,
        module=module,
        inputs=(
            Port("hidden_states", latent),
            Port(
                "encoder_hidden_states",
                ("batch_size", "sequence_length", str(config.caption_channels)),
            ),
            Port("encoder_attention_mask", ("batch_size", "sequence_length"), "int64"),
            Port("timestep", ("1",), "float32"),
        ),
        outputs=(Port("out_hidden_states", latent),),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={
            "batch_size": 2,
            "height": 4 * patch,
            "width": 6 * patch,
            "sequence_length": 11,
        },
        multiples={"height": patch, "width": patch},
    )


def pixart_transformer_part(name: str, model: Any) -> Part:
    """The transformer, with the picture's size where it was trained with it."""
    if not model.use_additional_conditions:
        return masked_transformer_part(name, _Transformer(model), model)
    plain = masked_transformer_part(name, _SizedTransformer(model), model)
    sized = (Port("resolution", ("batch_size", "2")), Port("aspect_ratio", ("batch_size", "1")))
    return dataclasses.replace(plain, inputs=(*plain.inputs, *sized))


class PixArt(ExportFamily):
    """T5 with a mask."""

    name: ClassVar[str] = "pixart"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    not_fused: ClassVar[str] = MASKED

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        return (
            masked_t5_part("text_encoder", part_of(pipe, "text_encoder")),
            pixart_transformer_part("transformer", pipe.transformer),
            *autoencoder_parts(pipe.vae),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        return {
            **autoencoder_settings(pipe.vae, spatial_factor(pipe.vae)),
            "sample_size": square(pipe.transformer.config.sample_size),
            "patch_size": pipe.transformer.config.patch_size,
            "max_sequence_length": stock_default(pipe, "max_sequence_length"),
        }
