"""Between pictures and arrays of -1 to 1; the same rounding as diffusers' image processor."""

from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.hosts.host import Size

Picture = Image.Image | np.ndarray | str | Path


def to_uint8(decoded: np.ndarray) -> np.ndarray:
    """Decoded pictures (B, 3, H, W), -1 to 1, as uint8 (B, H, W, 3); (B, F, H, W, 3) of clips."""
    unit = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    channels_last = (0, *range(2, len(decoded.shape)), 1)
    # turned before the cast: TensorRT knows uint8 at a graph's ends only
    return np.round(unit * np.float32(255.0)).transpose(*channels_last).astype(np.uint8)


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """Pictures of uint8 (B, H, W, 3)."""
    return [Image.fromarray(one) for one in pixels]


def read_picture(picture: Picture, size: Size | None) -> np.ndarray:
    """A picture as (1, 3, H, W), float32, -1 to 1, resized where a size is asked for.

    Raises:
        RuntimeSettingError: It cannot be read, or is no picture.
    """
    image = _opened(picture)
    if size is not None and image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32) / np.float32(255.0)
    return (np.float32(2.0) * pixels - np.float32(1.0)).transpose(2, 0, 1)[None]


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise RuntimeSettingError(
                f"image is {picture.dtype} of shape {picture.shape}; wanted uint8 (H, W, 3)"
            )
        return Image.fromarray(picture)
    try:
        return Image.open(picture).convert("RGB")
    except OSError as error:
        raise RuntimeSettingError(f"image {picture} cannot be read ({error})") from error
