"""What an artefact may differ by, and how slow it may be."""

import math
from dataclasses import dataclass

from fewstep.runtime.manifest import Measured, Precision

HIGHER_IS_BETTER = ("dB", "SSIM")
EQUAL_DB = 100.0
"""Stands for equal pictures, whose PSNR is infinite: JSON has no infinity."""
NO_NUMBER = 1e30
"""Stands for a difference that is NaN or infinite, for the same reason; it misses every limit."""
SLOWER = 1.05
"""Ratio of times that counts as slower; interleaved medians of equal graphs stay below it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one precision.

    Attributes:
        component: Largest error of a component's output, relative to the largest value.
        latents: Largest error of the final latents.
        psnr_db: Of the worst picture.
        ssim: Of the worst picture.
    """

    component: float | None
    latents: float | None
    psnr_db: float
    ssim: float


FLOAT32 = Limits(component=1e-3, latents=1e-3, psnr_db=45.0, ssim=0.98)
FLOAT16 = Limits(component=2e-2, latents=2e-2, psnr_db=45.0, ssim=0.98)
EIGHT_BITS = Limits(component=None, latents=None, psnr_db=30.0, ssim=0.90)
FOUR_BITS = Limits(component=None, latents=None, psnr_db=24.0, ssim=0.80)

FINEST_FIRST: tuple[tuple[Precision, ...], ...] = (
    ("fp32",),
    ("fp16",),
    ("bf16", "int8-dynamic", "int8-static", "fp8"),
    ("int4", "nvfp4"),
)
"""Those in one group are equally fine."""
LIMITS: dict[Precision, Limits] = {
    "fp32": FLOAT32,
    "fp16": FLOAT16,
    "bf16": EIGHT_BITS,  # eight bits of mantissa
    "int8-dynamic": EIGHT_BITS,
    "int8-static": EIGHT_BITS,
    "fp8": EIGHT_BITS,
    "int4": FOUR_BITS,
    "nvfp4": FOUR_BITS,
}


def coarseness(precision: Precision) -> int:
    """0 for the finest."""
    return next(i for i, group in enumerate(FINEST_FIRST) if precision in group)


def finite(value: float) -> float:
    """A difference as JSON can hold it."""
    return min(value, NO_NUMBER) if math.isfinite(value) else NO_NUMBER


def shown(value: float) -> str:
    """A figure for people."""
    return "no number" if value >= NO_NUMBER else f"{value:.4g}"


def is_within(measured: Measured) -> bool:
    """Whether a figure keeps its limit; one that is not a number does not."""
    if measured.limit is None:
        return True
    if measured.unit in HIGHER_IS_BETTER:
        return measured.value >= measured.limit
    return measured.value <= measured.limit
