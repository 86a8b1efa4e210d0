"""A clip as a file."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.cache_folder import whole_file

SUFFIX = ".webp"
DESCRIPTION = 0x010E
"""Exif's ImageDescription."""


def save_clip(
    frames: Sequence[Image.Image],
    path: Path,
    frames_per_second: float,
    description: str | None = None,
) -> None:
    """Write pictures as an animated WebP, without loss: the file holds what the seed stands for.

    Args:
        frames: At least one.
        path: Ends in .webp.
        frames_per_second: How fast it is shown.
        description: ASCII text that is kept inside.

    Raises:
        RuntimeSettingError: The name has another ending.
    """
    if path.suffix.lower() != SUFFIX:
        raise RuntimeSettingError(f"{path} is to hold a clip; give it a name ending in {SUFFIX}")
    facts = Image.Exif()
    if description is not None:
        facts[DESCRIPTION] = description
    first, *others = frames
    with whole_file(path) as partial:
        first.save(
            partial,
            save_all=True,
            append_images=others,
            duration=round(1000.0 / frames_per_second),
            loop=0,
            lossless=True,
            exif=facts,
        )
