"""Wan 2.1 and 2.2, text to video: one transformer, or one for each half of the noise."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.errors import ExportError
from fewstep.export.families.family import ExportFamily, part_of, stock_default
from fewstep.export.families.joint_attention import attend
from fewstep.export.families.rotary import Angles, turned
from fewstep.export.families.stand_ins import processors
from fewstep.export.families.text_encoders import masked_t5_part
from fewstep.export.families.wan_autoencoder import wan_decoder_part
from fewstep.export.part import Part, Port

STOCK_DEFAULTS = ("max_sequence_length", "height", "width", "num_frames")
FRAMES_PER_SECOND = 16
"""What the networks were trained at; no configuration says so."""


class _Attention:
    """The stock processor without writes into slices, which become scatters in a graph."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Angles | None = None,
    ) -> Tensor:
        del attention_mask
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(states))
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)) for part in (query, key, attn.to_v(states))
        )
        if rotary_emb is not None:
            query, key = turned(query, rotary_emb), turned(key, rotary_emb)
        return attn.to_out[1](attn.to_out[0](attend(query, key, value, None)))


class _Transformer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        model = self.model
        batch = hidden_states.shape[0]
        grid = model.patch_embedding(hidden_states)
        counts = grid.shape[2:]
        tokens = grid.flatten(2).transpose(1, 2)
        embedded, told, text, _ = model.condition_embedder(
            timestep.expand(batch), encoder_hidden_states, None, timestep_seq_len=None
        )
        told, angles = told.unflatten(1, (6, -1)), self._angles(*counts)
        attentions = [part for block in model.blocks for part in (block.attn1, block.attn2)]
        with processors(attentions, _Attention()):
            for block in model.blocks:
                tokens = block(tokens, text, told, angles)
        shift, scale = (model.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)
        found = model.norm_out(tokens.float()) * (1 + scale) + shift
        patches = model.proj_out(found.type_as(tokens))
        cut = patches.reshape(batch, *counts, *model.config.patch_size, -1)
        cut = cut.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _angles(self, frames: int, rows: int, columns: int) -> Angles:
        """Cosines and sines of every token; the stock tables hold each of them twice."""
        rope = self.model.rope
        first, second = rope.t_dim // 2, (rope.t_dim + rope.h_dim) // 2
        parts = []
        for table in (rope.freqs_cos, rope.freqs_sin):
            single = table[:, ::2]
            time, down, across = single[:, :first], single[:, first:second], single[:, second:]
            grid = (frames, rows, columns, -1)
            whole = [
                time[:frames, None, None].expand(grid),
                down[None, :rows, None].expand(grid),
                across[None, None, :columns].expand(grid),
            ]
            parts.append(torch.cat(whole, dim=-1).flatten(0, 2))
        return parts[0], parts[1]


def wan_transformer_part(name: str, model: Any) -> Part:
    """One transformer of a text-to-video pipeline.

    Raises:
        ExportError: It reads pictures too.
    """
    config = model.config
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        raise ExportError(
            "this Wan transformer reads pictures, which is not exported; use the pipeline"
        )
    frame, height, width = config.patch_size
    video = ("batch_size", str(config.in_channels), "num_frames", "height", "width")
    return Part(
        name=name,
        module=_Transformer(model),
        inputs=(
            Port("hidden_states", video),
            Port("timestep", ("1",), "float32"),
            Port("encoder_hidden_states", ("batch_size", "sequence_length", str(config.text_dim))),
        ),
        outputs=(
            Port(
                "out_hidden_states",
                ("batch_size", str(config.out_channels), "num_frames", "height", "width"),
            ),
        ),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={
            "batch_size": 2,
            "num_frames": 3 * frame,
            "height": 4 * height,
            "width": 6 * width,
            "sequence_length": 11,
        },
        multiples={"num_frames": frame, "height": height, "width": width},
    )


class Wan(ExportFamily):
    """UMT5, the transformers, and the decoder with its memory."""

    name: ClassVar[str] = "wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    not_fused: ClassVar[str] = "decodes clips in pieces, which no fused graph holds"

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        if pipe.config.expand_timesteps:
            raise ExportError(
                "this Wan is told a time for every token, which is not exported; use the pipeline"
            )
        networks = [
            wan_transformer_part(name, getattr(pipe, name))
            for name in ("transformer", "transformer_2")
            if getattr(pipe, name) is not None
        ]
        return (
            masked_t5_part("text_encoder", part_of(pipe, "text_encoder")),
            *networks,
            wan_decoder_part(part_of(pipe, "vae")),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        return {
            "vae_scale_factor": pipe.vae_scale_factor_spatial,
            "vae_scale_factor_temporal": pipe.vae_scale_factor_temporal,
            "latent_channels": pipe.vae.config.z_dim,
            "frames_per_second": FRAMES_PER_SECOND,
            **{name: stock_default(pipe, name) for name in STOCK_DEFAULTS},
        }
