"""Sizes of samples that grow from step to step (SwD), the same as the scheduler's at inference."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from fewstep.schedulers.scale_ladder import ScaleLadder

if TYPE_CHECKING:
    from fewstep.trainer.context import StepContext


def shape_at(shape: tuple[int, ...], fraction: float) -> tuple[int, ...]:
    """Latent shape (C, h, w) at a fraction of the finished height and width.

    Args:
        shape: Of finished latents.
        fraction: As in `StudentPath.sizes`.
    """
    if fraction == 1.0:
        return shape
    ladder = ScaleLadder()
    ladder.start(*shape[-2:])
    return (*shape[:-2], *ladder.size(fraction))


def enlarged(x0: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Clean data (B, C, h, w) at the larger size of `shape`, bicubic as at inference."""
    return functional.interpolate(x0, size=shape[-2:], mode="bicubic", align_corners=False)


def reduced(x0: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Clean data (B, C, h, w) at the smaller size of `shape`: means over areas, as SwD's."""
    if x0.shape[-2:] == shape[-2:]:
        return x0
    return functional.interpolate(x0, size=shape[-2:], mode="area")


def real_like(context: "StepContext", shape: tuple[int, ...]) -> Tensor:
    """The update's real latents, (B, C, h, w), at the size of a fake's shape (C, h, w)."""
    return reduced(context.real.x0, shape)
