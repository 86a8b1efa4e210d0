"""Text encoders as parts: CLIP with or without projection, T5."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.part import Part, Port

IDS = (Port("input_ids", ("batch_size", "sequence_length"), "int64"),)
STATE = ("batch_size", "sequence_length")


class _Clip(nn.Module):
    """Outputs in the order Optimum's pipelines read them: the projection first where there is one.

    Args:
        model: CLIPTextModel or CLIPTextModelWithProjection.
        has_states: Whether every layer's state is an output (SDXL, SD3 read the last but one).
    """

    def __init__(self, model: Any, *, has_states: bool) -> None:
        super().__init__()
        self.model, self.has_states = model, has_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids, output_hidden_states=self.has_states, return_dict=True)
        states = tuple(found.hidden_states) if self.has_states else ()
        if hasattr(found, "text_embeds"):
            return (found.text_embeds, found.last_hidden_state, *states)
        return (found.last_hidden_state, found.pooler_output, *states)


class _T5(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, return_dict=False)[0]


def clip_part(name: str, model: Any, *, has_states: bool) -> Part:
    """A CLIP text encoder; its length is free up to the positions it was trained with."""
    config = model.config
    width, count = config.hidden_size, config.num_hidden_layers + 1
    has_projection = "WithProjection" in type(model).__name__
    pooled = config.projection_dim if has_projection else width
    outputs = [
        Port("last_hidden_state", (*STATE, str(width))),
        Port("pooler_output", ("batch_size", str(pooled))),
    ]
    if has_projection:
        outputs = [Port("text_embeds", ("batch_size", str(pooled))), outputs[0]]
    if has_states:
        outputs += [Port(f"hidden_states.{i}", (*STATE, str(width))) for i in range(count)]
    return Part(
        name=name,
        module=_Clip(model, has_states=has_states),
        inputs=IDS,
        outputs=tuple(outputs),
        config={**config.to_dict(), "architectures": [type(model).__name__]},
        sizes={"batch_size": 2, "sequence_length": min(11, config.max_position_embeddings)},
        vocabulary=config.vocab_size,
    )


def t5_part(name: str, model: Any) -> Part:
    """A T5 encoder without a mask, as SD3 and FLUX call it."""
    return Part(
        name=name,
        module=_T5(model),
        inputs=IDS,
        outputs=(Port("last_hidden_state", (*STATE, str(model.config.d_model))),),
        config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        sizes={"batch_size": 2, "sequence_length": 11},
        vocabulary=model.config.vocab_size,
    )


class _MaskedT5(_T5):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        dtype = self.model.dtype
        hidden = (1 - attention_mask).to(dtype)[:, None, None] * torch.finfo(dtype).min
        return self.model(input_ids, attention_mask=hidden, return_dict=False)[0]


def masked_t5_part(name: str, model: Any) -> Part:
    """A T5 encoder whose padding is masked, as PixArt and Wan call it."""
    plain = t5_part(name, model)
    mask = Port("attention_mask", STATE, "int64")
    return replace(plain, module=_MaskedT5(model), inputs=(*IDS, mask))
