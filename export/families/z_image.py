"""Z-Image: one stream of picture and text tokens, both filled up to multiples of 32."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.errors import ExportError
from fewstep.export.families.autoencoders import autoencoder_parts, spatial_factor
from fewstep.export.families.family import (
    MASKED,
    ExportFamily,
    autoencoder_settings,
    part_of,
    stock_default,
)
from fewstep.export.families.joint_attention import attend
from fewstep.export.families.language_models import language_model_part
from fewstep.export.families.rotary import Angles, rates, turned
from fewstep.export.families.stand_ins import processors
from fewstep.export.part import Part, Port

PATCH = 2
MULTIPLE = 32
"""Tokens of either kind are filled up to this, with tokens that were trained for it."""
STOCK_SIDE = 1024
"""Pixels per side that the stock pipeline draws where nobody says."""
MARK = "\u2063prompt\u2063"
"""Stands where a prompt would, to see what a chat template puts around it."""


class _Attention:
    """The stock processor in real numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Angles | None = None,
    ) -> Tensor:
        del encoder_hidden_states
        assert freqs_cis is not None
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = turned(query, freqs_cis), turned(key, freqs_cis)
        return attn.to_out[0](attend(query, key, value, attention_mask))


class _Transformer(nn.Module):
    """On whole tensors in place of lists; cutting into patches is part of the graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.tables = [
            _table(width, count, model.rope_theta)
            for width, count in zip(model.axes_dims, model.axes_lens, strict=True)
        ]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        model = self.model
        batch, channels = hidden_states.shape[:2]
        rows, columns = hidden_states.shape[2] // PATCH, hidden_states.shape[3] // PATCH
        real = encoder_attention_mask > 0
        there, lengths = _filled(real)
        told = model.t_embedder(timestep.expand(batch) * model.t_scale).to(hidden_states.dtype)

        cut = hidden_states.reshape(batch, channels, rows, PATCH, columns, PATCH)
        tokens = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        picture = self._picture_tokens(tokens)
        places = _picture_places(rows, columns, picture.shape[1], lengths)
        picture_angles = self._angles(places)
        text = torch.where(
            real[..., None], model.cap_embedder(encoder_hidden_states), model.cap_pad_token
        )
        text_angles = self._angles(_text_places(text))

        blocks = [*model.noise_refiner, *model.context_refiner, *model.layers]
        with processors([block.attention for block in blocks], _Attention()):
            for block in model.noise_refiner:
                picture = block(picture, None, picture_angles, told)
            for block in model.context_refiner:
                text = block(text, there, text_angles)
            both = torch.cat([picture, text], dim=1)
            seen = torch.cat([torch.ones_like(picture[..., 0], dtype=torch.bool), there], dim=1)
            angles = _joined(picture_angles, text_angles)
            for block in model.layers:
                both = block(both, seen, angles, told)
        found = model.all_final_layer[f"{PATCH}-1"](both, c=told)[:, : rows * columns]
        grid = found.reshape(batch, rows, columns, PATCH, PATCH, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape)

    def _picture_tokens(self, tokens: Tensor) -> Tensor:
        """Embedded, and filled up to a multiple."""
        embedded = self.model.all_x_embedder[f"{PATCH}-1"](tokens)
        count = tokens.shape[1]
        index = torch.arange((count + MULTIPLE - 1) // MULTIPLE * MULTIPLE)
        filled = embedded[:, index.clamp(max=count - 1)]
        return torch.where((index < count)[None, :, None], filled, self.model.x_pad_token)

    def _angles(self, places: Tensor) -> Angles:
        parts = [
            (cosine[places[..., axis]], sine[places[..., axis]])
            for axis, (cosine, sine) in enumerate(self.tables)
        ]
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def _table(width: int, count: int, theta: float) -> Angles:
    """Angles of every position of an axis: made in double precision, as stock."""
    angle = torch.outer(torch.arange(count, dtype=torch.float64), rates(width, theta)).float()
    return angle.cos(), angle.sin()


def _filled(real: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of texts are attended to, and how many: real ones, up to a multiple."""
    lengths = (real.sum(dim=1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    return torch.arange(real.shape[1])[None] < lengths[:, None], lengths


def _picture_places(rows: int, columns: int, count: int, lengths: Tensor) -> Tensor:
    """(after the text, row, column); tokens that fill up are at the origin."""
    index = torch.arange(count)
    row = torch.div(index, columns, rounding_mode="floor")
    inside = (index < rows * columns).to(torch.int64)
    row, column = row * inside, (index - row * columns) * inside
    depth = (lengths[:, None] + 1) * inside[None]
    flat = torch.stack([row, column], dim=-1)[None].expand(lengths.shape[0], -1, -1)
    return torch.cat([depth[..., None], flat], dim=-1)


def _text_places(text: Tensor) -> Tensor:
    """(1, 0, 0), (2, 0, 0), ..."""
    index = (torch.arange(text.shape[1]) + 1)[None, :, None].expand(text.shape[0], -1, -1)
    nothing = torch.zeros_like(index)
    return torch.cat([index, nothing, nothing], dim=-1)


def _joined(first: Angles, second: Angles) -> Angles:
    cosine, sine = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    return cosine, sine


def z_image_transformer_part(name: str, model: Any) -> Part:
    """The transformer; its timestep is 1 minus the schedule's over 1000, its output the negative.

    Raises:
        ExportError: A variant that reads pictures too, or other patches.
    """
    config = model.config
    if config.siglip_feat_dim is not None or f"{PATCH}-1" not in model.all_x_embedder:
        raise ExportError(
            "this Z-Image transformer reads pictures or has other patches, which is not exported; "
            "use the pipeline"
        )
    latent = ("batch_size", str(config.in_channels), "height", "width")
    return Part(
        name=name,
        module=_Transformer(model),
        inputs=(
            Port("hidden_states", latent),
            Port(
                "encoder_hidden_states",
                ("batch_size", "sequence_length", str(config.cap_feat_dim)),
            ),
            Port("encoder_attention_mask", ("batch_size", "sequence_length"), "int64"),
            Port("timestep", ("1",), "float32"),
        ),
        outputs=(Port("out_hidden_states", latent),),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={"batch_size": 2, "height": 12, "width": 8, "sequence_length": 2 * MULTIPLE},
        multiples={"height": PATCH, "width": PATCH, "sequence_length": MULTIPLE},
        timestep=0.5,
    )


class ZImage(ExportFamily):
    """Qwen 3 reads the prompt in its chat template; its states before the last layer are used."""

    name: ClassVar[str] = "z-image"
    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    not_fused: ClassVar[str] = MASKED

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        encoder = part_of(pipe, "text_encoder")
        return (
            language_model_part("text_encoder", encoder, layer=-2, config=encoder.config),
            z_image_transformer_part("transformer", pipe.transformer),
            *autoencoder_parts(pipe.vae),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        factor = spatial_factor(pipe.vae)
        return {
            **autoencoder_settings(pipe.vae, factor),
            "sample_size": STOCK_SIDE // factor,
            "patch_size": PATCH,
            "max_sequence_length": stock_default(pipe, "max_sequence_length"),
        }

    def texts(self, pipe: Any) -> dict[str, str]:
        found = part_of(pipe, "tokenizer").apply_chat_template(
            [{"role": "user", "content": MARK}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        if found.count(MARK) != 1:
            raise ExportError(
                "the tokenizer's chat template does not hold the prompt once as it is, so a host "
                "without transformers cannot fill it; use the pipeline"
            )
        before, _, after = found.partition(MARK)
        return {"before": before, "after": after}
