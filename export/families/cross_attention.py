"""Attention of picture tokens to a masked text, as PixArt and Sana have it, traceable."""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CrossAttention:
    """Stands in for the stock processors, whose repeated mask torch's exporter cannot follow."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Shapes (B, N, D), (B, L, D') and, added to the scores, (B, 1, L)."""
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        heads = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        found = scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None])
        found = found.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](found)) / attn.rescale_output_factor
