"""How equal two renderings of the same picture are: PSNR and SSIM, through scikit-image."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.errors import MissingExtraError, ShapeError

SSIM_WINDOW_PX = 7


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement of two pictures, or the worst of a batch.

    Attributes:
        psnr_db: Peak signal-to-noise ratio in decibel; infinite for equal pictures.
        ssim: Structural similarity, 1 for equal pictures.
    """

    psnr_db: float
    ssim: float


def image_parity(reference: np.ndarray, other: np.ndarray, *, peak: float = 255.0) -> Parity:
    """PSNR and SSIM of one picture.

    Args:
        reference: Shape (H, W, C), at least 7 px a side.
        other: Same shape.
        peak: Largest possible value: 255 for uint8, 1 for floats from 0 to 1.

    Raises:
        ShapeError: Shapes differ or the picture is too small.
        MissingExtraError: scikit-image is not installed.

    Source:
        Wang et al. 2004 (SSIM), as implemented in skimage.metrics (uniform 7 px window).
    """
    if reference.shape != other.shape or reference.ndim != 3:
        raise ShapeError(
            f"got pictures of shape {reference.shape} and {other.shape}; wanted (H, W, C) twice"
        )
    if min(reference.shape[:2]) < SSIM_WINDOW_PX:
        raise ShapeError(
            f"got pictures of shape {reference.shape}; SSIM needs {SSIM_WINDOW_PX} px a side"
        )
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise MissingExtraError("scikit-image", "export") from error
    first, second = reference.astype(np.float64), other.astype(np.float64)
    if np.array_equal(first, second):
        return Parity(math.inf, 1.0)
    psnr_db = peak_signal_noise_ratio(first, second, data_range=peak)
    ssim: Any = structural_similarity(first, second, data_range=peak, channel_axis=-1)
    return Parity(float(psnr_db), float(ssim))


def worst_parity(reference: np.ndarray, other: np.ndarray, *, peak: float = 255.0) -> Parity:
    """The lowest PSNR and the lowest SSIM of a batch of pictures.

    Args:
        reference: Shape (N, H, W, C), N >= 1.
        other: Same shape.
        peak: See `image_parity`.

    Raises:
        ShapeError: Shapes differ or there is no picture.
    """
    if reference.shape != other.shape or reference.ndim != 4 or len(reference) == 0:
        raise ShapeError(
            f"got batches of shape {reference.shape} and {other.shape}; wanted (N, H, W, C) twice"
        )
    each = [image_parity(a, b, peak=peak) for a, b in zip(reference, other, strict=True)]
    return Parity(min(p.psnr_db for p in each), min(p.ssim for p in each))
