"""Pictures under running numbers, with their facts inside; what a request for them may say."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import ConfigError
from fewstep.noise import MAX_SEED
from fewstep.recipe import METADATA_KEY

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = re.compile(r"[1-9]\d*x[1-9]\d*")
NUMBER = re.compile(r"(\d+)-seed\d+\.(png|webp)")


class PictureFolder:
    """Saves pictures under running numbers, after those the folder already holds.

    Args:
        folder: Made if missing.
        recipe_json: Goes into every PNG beside the picture's own facts.

    Raises:
        ConfigError: The folder cannot be made.
    """

    def __init__(self, folder: Path, recipe_json: str) -> None:
        check_out(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {folder} cannot be made ({error.strerror}); name another folder"
            ) from error
        self._folder = folder
        self._recipe_json = recipe_json
        taken = (NUMBER.match(path.name) for path in folder.iterdir())
        self._next = 1 + max((int(match[1]) for match in taken if match), default=-1)
        self.saved: list[dict[str, Any]] = []
        """File, prompt and seed of every picture so far."""

    @property
    def names(self) -> list[str]:
        """Paths of the saved files."""
        return [picture["file"] for picture in self.saved]

    def save(self, image: "Image", facts: dict[str, Any]) -> None:
        """Write one PNG with its facts as text metadata ("fewstep" and "fewstep.recipe")."""
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("fewstep", json.dumps(facts))
        text.add_itxt(METADATA_KEY, self._recipe_json)
        image.save(self._enter(facts, ".png"), pnginfo=text)

    def save_clip(
        self, frames: "Sequence[Image]", frames_per_second: float, facts: dict[str, Any]
    ) -> None:
        """Write one animated WebP with its facts, as JSON, as its Exif description."""
        from fewstep.runtime.clips import SUFFIX, save_clip

        told = json.dumps({"fewstep": facts, METADATA_KEY: self._recipe_json})
        save_clip(frames, self._enter(facts, SUFFIX), frames_per_second, told)

    def _enter(self, facts: dict[str, Any], suffix: str) -> Path:
        """The next file's path."""
        path = self._folder / f"{self._next:04d}-seed{facts['seed']}{suffix}"
        self._next += 1
        self.saved.append({"file": str(path), "prompt": facts["prompt"], "seed": facts["seed"]})
        return path


def check_out(folder: Path) -> None:
    """Refuse a place where no folder can be, before a model is loaded.

    Raises:
        ConfigError: A file is there, or where a folder above it would be.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"--out must be a folder, and {path} is a file; name another place, it is made if "
                "missing"
            )


def check_request(num_images: int, batch_size: int, seed: int, size: str | None) -> None:
    """Refuse counts, seeds and sizes that no picture can have.

    Raises:
        ConfigError: One is out of range; the message names the option.
    """
    if num_images < 1 or batch_size < 1:
        raise ConfigError(
            f"--num-images and --batch-size must be >= 1, got {num_images} and {batch_size}"
        )
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed must be 0 to 2**64 - 1, got {seed}")
    if size is not None:
        read_size(size)


def read_size(size: str) -> tuple[int, int]:
    """Height and width of "512x768".

    Raises:
        ConfigError: It is not two numbers.
    """
    if not SIZE.fullmatch(size):
        raise ConfigError(f"--size must be HEIGHTxWIDTH such as 512x768, got {size}")
    height, width = size.split("x")
    return int(height), int(width)
