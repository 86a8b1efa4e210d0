"""Attention over text and picture tokens together, as FLUX and Qwen-Image have it, traceable."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.export.families.rotary import Angles, turned


class JointAttention:
    """Stands in for the stock processors: real rotary angles, slices in place of splits.

    `angles` are those of the joint sequence, text first.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        del attention_mask
        assert image_rotary_emb is not None
        query, key, value = _projected(attn, hidden_states)
        length = 0
        if encoder_hidden_states is not None:
            text = _projected_text(attn, encoder_hidden_states)
            length = encoder_hidden_states.shape[1]
            query, key, value = (
                torch.cat(pair, dim=1) for pair in zip(text, (query, key, value), strict=True)
            )
        query, key = turned(query, image_rotary_emb), turned(key, image_rotary_emb)
        seen = _joint_mask(encoder_hidden_states_mask, hidden_states)
        found = attend(query, key, value, seen)
        if encoder_hidden_states is None:
            return found
        picture = attn.to_out[1](attn.to_out[0](found[:, length:]))
        return picture, attn.to_add_out(found[:, :length])


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of (B, L, heads, D) as (B, L, heads * D); `seen` is (B, L) or None."""
    mask = None if seen is None else seen[:, None, None]
    heads = (part.transpose(1, 2) for part in (query, key, value))
    found = scaled_dot_product_attention(*heads, attn_mask=mask)
    return found.transpose(1, 2).flatten(2)


def _joint_mask(text: Tensor | None, picture: Tensor) -> Tensor | None:
    if text is None:
        return None
    return torch.cat([text, torch.ones_like(picture[..., 0], dtype=torch.bool)], dim=1)


def _projected(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        _heads(attn, project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    return attn.norm_q(query), attn.norm_k(key), value


def _projected_text(attn: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (_heads(attn, project(states)) for project in projections)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _heads(attn: Any, states: Tensor) -> Tensor:
    return states.unflatten(-1, (-1, attn.inner_dim // attn.heads))
