"""What the runtime gives: pictures or clips, as arrays, for Pillow, or as a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.cache_folder import whole_file
from fewstep.runtime.clips import save_clip
from fewstep.runtime.pictures import to_pil


@dataclass(frozen=True, slots=True)
class RuntimeOutput:
    """What a call gives.

    Attributes:
        pixels: uint8, shape (N, H, W, 3), or (N, F, H, W, 3) of clips.
        seeds: Of each picture or clip.
        frames_per_second: Of clips; None of pictures.
    """

    pixels: np.ndarray
    seeds: tuple[int, ...]
    frames_per_second: float | None = None

    @property
    def is_clips(self) -> bool:
        """Whether there are clips and not pictures."""
        return self.pixels.ndim == 5

    @property
    def images(self) -> list[Image.Image]:
        """The pictures for Pillow.

        Raises:
            RuntimeSettingError: There are clips.
        """
        if self.is_clips:
            raise RuntimeSettingError("images was asked of clips; take frames, or save")
        return to_pil(self.pixels)

    @property
    def frames(self) -> list[list[Image.Image]]:
        """The pictures of each clip; a single picture is a clip of one."""
        return [to_pil(clip) for clip in (self.pixels if self.is_clips else self.pixels[:, None])]

    def save(self, path: str | Path, index: int = 0) -> None:
        """Write one picture in the format its name says, or one clip as an animated WebP.

        Args:
            path: Of the file; a clip's ends in .webp.
            index: Which one.

        Raises:
            RuntimeSettingError: A clip was given another ending.
        """
        frames = to_pil(self.pixels[index] if self.is_clips else self.pixels[index : index + 1])
        if self.frames_per_second is None:
            with whole_file(Path(path)) as partial:
                frames[0].save(partial)
        else:
            save_clip(frames, Path(path), self.frames_per_second)
