"""Samples that grow from step to step (SwD): sizes, and clean data enlarged between steps."""

import math

import torch
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.trajectory import PlannedStep

MULTIPLE = 2
"""Latent sizes are kept even, which every patch size in use divides."""


class ScaleLadder:
    """The latent sizes of one image; learnt from its first sample.

    Source:
        Starodubcev et al. 2025 (SwD), arXiv:2503.16397: x0 is enlarged, then noised again.
    """

    def __init__(self) -> None:
        self._full: tuple[int, int] | None = None

    def start(self, height: int, width: int) -> None:
        """Tell the size of the finished latents."""
        self._full = (height, width)

    def size(self, fraction: float) -> tuple[int, int]:
        """Height and width of latents at a fraction of the finished size.

        Raises:
            PipelineError: `start` was not called.
        """
        if self._full is None:
            raise PipelineError(
                "this recipe's samples grow from step to step, which this pipeline does not "
                "support; use the pipeline class of the recipe's base for text to image"
            )
        height, width = self._full
        return _scaled(height, fraction), _scaled(width, fraction)

    def climb(self, x0: Tensor, planned: PlannedStep) -> Tensor:
        """Clean data at the size of the step's result, bicubic as SwD's own sampler.

        Args:
            x0: Shape (B, C, h, w).
            planned: The step.
        """
        size = self.size(planned.following_size)
        return torch.nn.functional.interpolate(x0, size=size, mode="bicubic", align_corners=False)


def _scaled(length: int, fraction: float) -> int:
    if fraction == 1.0:
        return length
    return max(MULTIPLE, MULTIPLE * math.floor(fraction * length / MULTIPLE + 0.5))
