"""Rotary positions in real numbers, single precision: ONNX has no complex type, TensorRT no double.

Stock networks turn pairs of channels by complex multiplication, with angles made in double
precision or looked up. The angles here are the same numbers, their sines and cosines apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, each (..., L, D / 2)."""


def rates(width: int, theta: float) -> Tensor:
    """Angle per position of each of `width / 2` channel pairs, float64."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)


def angles_of(ids: Tensor, rates_of_axes: Sequence[Tensor]) -> Angles:
    """Angles of positions.

    Args:
        ids: Positions, shape (..., L, axes), float32.
        rates_of_axes: Per axis, float32.
    """
    turns = [ids[..., axis, None] * rate for axis, rate in enumerate(rates_of_axes)]
    angle = torch.cat(turns, dim=-1)
    return angle.cos(), angle.sin()


def turned(sample: Tensor, angles: Angles) -> Tensor:
    """Channel pairs of (B, L, heads, D), turned by the angles of their token."""
    cosine, sine = (part.unsqueeze(-2) for part in angles)
    first, second = sample.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.stack(pairs, dim=-1).flatten(-2).to(sample.dtype)
