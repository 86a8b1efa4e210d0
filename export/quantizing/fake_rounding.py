"""What the quantized graph does to numbers, in torch and with a gradient.

Rounding has no slope; it is passed by (Bengio et al. 2013): forward rounds, backward does not.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.errors import ExportError
from fewstep.export.quantizing.schemes import Int4, Int8Dynamic, Int8Static, Scheme

TINY = 1e-12


class PerChannel(nn.Module):
    """Weights in 8 bits, one symmetric scale per output channel, as ONNX Runtime writes them.

    Args:
        levels: Largest integer: 127, or 64 where products may clip.
    """

    def __init__(self, levels: int = 127) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, weight: Tensor) -> Tensor:
        """The weight after rounding; shape (out, ...)."""
        axes = tuple(range(1, weight.ndim))
        scale = weight.detach().abs().amax(axes, keepdim=True).clamp_min(TINY) / self.levels
        return pass_by(weight, (weight / scale).round().clamp(-self.levels, self.levels) * scale)


class PerBlock(nn.Module):
    """Weights in 4 bits, -8 to 7, a scale per block of inputs, as MatMulNBits stores them.

    The number of largest magnitude in a block becomes -8 exactly, whatever its sign.

    Args:
        block: Inputs per scale.
    """

    LOWEST: ClassVar[int] = -8

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, weight: Tensor) -> Tensor:
        """The weight after rounding; shape (out, in)."""
        out, given = weight.shape
        missing = -given % self.block
        blocks = nn.functional.pad(weight, (0, missing)).view(out, -1, self.block)
        held = blocks.detach()
        largest = held.gather(-1, held.abs().argmax(-1, keepdim=True))
        scale = largest / self.LOWEST
        safe = torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)
        rounded = (blocks / safe).round().clamp(self.LOWEST, -self.LOWEST - 1) * safe
        return pass_by(weight, rounded.view(out, -1)[:, :given])


class PerTensor(nn.Module):
    """Activations in 8 bits, range taken from the tensor itself and always with 0 in it."""

    def forward(self, value: Tensor) -> Tensor:
        """The activation after rounding, same shape."""
        held = value.detach()
        low, high = held.amin().clamp_max(0.0), held.amax().clamp_min(0.0)
        scale = ((high - low) / 255.0).clamp_min(TINY)
        zero = (-low / scale).round()
        rounded = ((value / scale).round() + zero).clamp(0.0, 255.0) - zero
        return pass_by(value, rounded * scale)


def pass_by(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` forward, the gradient of `value` backward."""
    return value + (rounded - value).detach()


def weight_rounding(scheme: Scheme) -> nn.Module:
    """What a scheme does to weights.

    Raises:
        ExportError: It is none that can be imitated.
    """
    if isinstance(scheme, Int4):
        return PerBlock(scheme.block)
    if isinstance(scheme, Int8Dynamic | Int8Static):
        return PerChannel(64 if scheme.notes["seven_bits"] else 127)
    raise ExportError(
        f"--distil imitates int8-dynamic, int8-static and int4, not {scheme.precision}"
    )


def activation_rounding(scheme: Scheme) -> nn.Module | None:
    """What it does to a layer's input; None where that is too fine to be trained against."""
    is_fine = isinstance(scheme, Int8Static) and scheme.activations == "uint16"
    return None if isinstance(scheme, Int4) or is_fine else PerTensor()
