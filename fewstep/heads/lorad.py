"""LoRaD: low-rank rotations of the columns of a linear layer, two by two and row by row.

    theta = A B                                   A: (out, r), B: (r, in / 2)
    (W[:, 2j], W[:, 2j + 1]) -> (W[:, 2j] cos theta[:, j] - W[:, 2j + 1] sin theta[:, j],
                                 W[:, 2j] sin theta[:, j] + W[:, 2j + 1] cos theta[:, j])

The norm of every pair, and so of every row, stays what it was; A = 0 is the weight itself. Angles
count modulo 2 pi, so wrapping them to (-pi, pi] would change nothing.
"""

import torch
from torch import Tensor

from fewstep.errors import ShapeError


def rotate(weight: Tensor, angles: Tensor) -> Tensor:
    """A weight with its pairs of columns turned; differentiable in both.

    Args:
        weight: Shape (out, in), in even, any float dtype.
        angles: Radians. Shape (out, in / 2).

    Returns:
        Shape (out, in), float32 or the wider of the two dtypes. Zero angles give the weight back
        bit for bit.

    Raises:
        ShapeError: The shapes do not belong together.

    Source:
        WaDi (weight direction-aware distillation), LoRaD adapter.
    """
    if weight.ndim != 2 or weight.shape[1] % 2 or angles.shape != half_shape(weight):
        raise ShapeError(
            f"a rotation needs a weight (out, in) with in even and angles (out, in / 2), got "
            f"{tuple(weight.shape)} and {tuple(angles.shape)}"
        )
    kind = torch.promote_types(torch.promote_types(weight.dtype, angles.dtype), torch.float32)
    first, second = weight.to(kind).unflatten(1, (-1, 2)).unbind(-1)
    cos, sin = angles.to(kind).cos(), angles.to(kind).sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(1)


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The rotated weight as hosts store it.

    Args:
        weight: Shape (out, in), in even.
        a: Shape (out, r), any device.
        b: Shape (r, in / 2), any device.
        scale: Multiplies the angles; 0 is the weight itself.

    Returns:
        Shape, dtype and device of `weight`; computed in float32, rounded once.
    """
    angles = scale * (a.to(weight.device).float() @ b.to(weight.device).float())
    return rotate(weight, angles).to(weight.dtype)


def half_shape(weight: Tensor) -> tuple[int, ...]:
    """Shape of a weight's angles."""
    return (weight.shape[0], weight.shape[-1] // 2)
