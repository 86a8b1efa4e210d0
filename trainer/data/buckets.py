"""Picture sizes of a run: aspect buckets for data, weighted sizes for prompts alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from fewstep.errors import ConfigError

Bucket = tuple[int, int]
"""(height, width) in px."""


def aspect_buckets(area_px: int, *, step_px: int, max_aspect: float) -> tuple[Bucket, ...]:
    """Sizes of about one area, from tall to wide.

    For every height and every width on the grid the other side is the largest that keeps the area
    within `area_px`, so none needs more memory than was asked for. The square is always there, and
    with every size the one with its sides exchanged.

    Args:
        area_px: Pixels of a picture, height times width, for example 1024 * 1024.
        step_px: Both sides are multiples of it: 64, or the VAE's factor times the patch size.
        max_aspect: Longer side over shorter side, at most; 1 gives the square alone.

    Returns:
        At least one size, no repetitions, by growing width over height.

    Raises:
        ConfigError: The settings are out of range.
    """
    if step_px < 1 or max_aspect < 1.0:
        raise ConfigError(
            f"buckets need step_px >= 1 and max_aspect >= 1, got {step_px} and {max_aspect}"
        )
    square = math.isqrt(max(area_px, 0)) // step_px * step_px
    if not square:
        raise ConfigError(
            f"area_px is {area_px}, less than one square of {step_px} px; raise it to "
            f"{step_px * step_px} or more"
        )
    found = {(square, square)}
    for side in range(step_px, area_px // step_px + 1, step_px):
        other = area_px // side // step_px * step_px
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=lambda size: (size[1] / size[0], size[1])))


def nearest_bucket(height_px: int, width_px: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest by ratio; of equal ones the largest.

    Distance is |log(aspect / bucket's aspect)|: twice as wide is as far as twice as tall.
    """

    def distance(bucket: Bucket) -> tuple[float, int, Bucket]:
        ratio = (width_px * bucket[0]) / (height_px * bucket[1])
        return round(abs(math.log(ratio)), 9), -bucket[0] * bucket[1], bucket

    return min(buckets, key=distance)


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The picture at a bucket's size: the largest centred crop of its aspect, resized (Lanczos)."""
    height, width = bucket
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class WeightedSize:
    """One picture size of a run on prompts alone.

    Attributes:
        height_px: Multiple of what the model needs.
        width_px: As above.
        weight: How often it is drawn, relative to the others.
    """

    height_px: int
    width_px: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.height_px < 1 or self.width_px < 1:
            raise ConfigError(f"a size must be positive, got {self.height_px} x {self.width_px} px")
        if not (math.isfinite(self.weight) and self.weight > 0.0):
            raise ConfigError(f"the weight of a size must be a number above 0, got {self.weight}")


def random_shapes(
    sizes: Sequence[WeightedSize], count: int, generator: torch.Generator
) -> list[Bucket]:
    """`count` sizes drawn by weight, with repetitions.

    Args:
        sizes: What can be drawn.
        count: How many; one per batch, as a batch has one size.
        generator: On the CPU; the only randomness.

    Raises:
        ConfigError: There is nothing to draw from.
    """
    if not sizes:
        raise ConfigError("no sizes were given; give at least one size to draw from")
    weights = torch.tensor([size.weight for size in sizes], dtype=torch.float64)
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    return [(sizes[i].height_px, sizes[i].width_px) for i in drawn.tolist()]
