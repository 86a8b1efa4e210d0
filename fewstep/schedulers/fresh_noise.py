"""Fresh noise for re-noising steps: image-shaped draws in float32 from each image's generator."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import PipelineError

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True, slots=True)
class NoiseLayout:
    """How a pipeline that packs its latents turns an image-shaped draw into its own layout.

    The noise stream is drawn image-shaped on every host; FLUX and Qwen-Image then reorder it.

    Attributes:
        shape: One image's latents before packing, (C, h, w).
        pack: (B, C, h, w) to the pipeline's layout.
    """

    shape: tuple[int, ...]
    pack: Callable[[Tensor], Tensor]


class FreshNoise:
    """Whose stream the fresh noise of a call is drawn from, and how it is laid out.

    Attributes:
        layouts: One image's packed shape -> how it is made; forgotten after `bound`.
    """

    def __init__(self) -> None:
        self._generator: Generators = None
        self.layouts: dict[tuple[int, ...], NoiseLayout] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FreshNoise":
        # A copy made inside a call draws from the same generators, which cannot be copied.
        twin = memo[id(self)] = FreshNoise()
        twin._generator, twin.layouts = self._generator, dict(self.layouts)
        return twin

    @contextmanager
    def bound(self, generator: Generators) -> Iterator[None]:
        """Inside, draws come from these generators where none are passed."""
        before, self._generator = self._generator, generator
        self.layouts.clear()
        try:
            yield
        finally:
            self._generator = before
            self.layouts.clear()

    def draw(self, shape: tuple[int, ...], generator: Generators = None) -> Tensor:
        """Standard normals in a pipeline's layout, drawn image-shaped.

        Args:
            shape: (B, ...), as the pipeline packs its samples.
            generator: Wins over `bound`.
        """
        chosen = self._generator if generator is None else generator
        layout = self.layouts.get(shape[1:])
        if layout is None:
            return draw_normal(shape, chosen)
        return layout.pack(draw_normal((shape[0], *layout.shape), chosen))


def draw_normal(shape: Sequence[int], generator: Generators) -> Tensor:
    """Standard normals in float32, drawn where the generator lives (the CPU without one).

    float32 whatever the sample's dtype: torch draws other numbers in half precision.

    Args:
        shape: (B, ...).
        generator: One for the batch, or a list of one per image.

    Raises:
        PipelineError: The list's length is not B.
    """
    if isinstance(generator, list):
        if len(generator) not in (1, shape[0]):
            raise PipelineError(
                f"got {len(generator)} generators for a batch of {shape[0]}; pass one per image"
            )
        if len(generator) == shape[0]:
            return torch.cat([draw_normal((1, *shape[1:]), g).cpu() for g in generator])
        generator = generator[0]
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
