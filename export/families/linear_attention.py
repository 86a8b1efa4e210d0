"""Sana's attention without softmax, with a divisor that survives optimisers of graphs.

Stock code adds 1e-15 to the divisor, which onnxscript's optimiser takes for 0 and drops: tokens
whose every query is negative then become 0 / 0. The divisor is never negative, so a lower bound
of 1e-15 gives the same float32 numbers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from fewstep.export.families.stand_ins import standing_in

SMALLEST = 1e-15


def attend_linearly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`value key^T query`, over the sum of its weights.

    Args:
        query: Shape (B, heads, D, N), not negative.
        key: As query.
        value: Shape (B, heads, D, N).
    """
    longer = pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
    found = torch.matmul(torch.matmul(longer, key.transpose(-1, -2)), query).float()
    return found[:, :, :-1] / found[:, :, -1:].clamp(min=SMALLEST)


class LinearAttention:
    """Stands in for the stock processor of Sana's transformer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        del encoder_hidden_states, attention_mask
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (
            part.transpose(1, 2).unflatten(1, (attn.heads, -1)).float()
            for part in (query, key, value)
        )
        found = attend_linearly(relu(query), relu(key), value)
        found = found.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        found = attn.to_out[1](attn.to_out[0](found))
        half = hidden_states.dtype == torch.float16
        return found.clip(-65504, 65504) if half else found


@contextmanager
def safe_divisors(model: nn.Module) -> Iterator[None]:
    """The linear attention of an autoencoder (DC-AE), traced with that divisor."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SanaMultiscaleLinearAttention):
                name = "apply_linear_attention"
                stack.enter_context(standing_in(module, attend_linearly, name))
        yield
