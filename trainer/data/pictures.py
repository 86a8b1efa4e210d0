"""One picture of a folder or a tar shard: measured from its header, decoded when it is encoded."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from fewstep.trainer.data.prompt_files import PromptList
from fewstep.trainer.data.rows import BadRowError

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of more than 8 bits; its conversion to RGB clips them to white."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a picture are.

    Attributes:
        file: The picture, or the shard that holds it.
        name: Its path within the source, with slashes; for a member, the shard's and its own.
        start: First byte in the file.
        num_bytes: Bytes of the picture.
        modified_ns: Modification time of the file.
        member: Its name in the shard; "" for a file of its own.
    """

    file: Path
    name: str
    start: int
    num_bytes: int
    modified_ns: int
    member: str = ""

    @property
    def where(self) -> str:
        """As errors name it."""
        return f"{self.file}, member {self.member}" if self.member else str(self.file)

    @staticmethod
    def of_file(file: Path, name: str) -> "Place":
        """A picture that is a file."""
        facts = file.stat()
        return Place(file, name, 0, facts.st_size, facts.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with its caption.

    Attributes:
        place: Where it is.
        caption: Its prompt, never empty.
        height_px: As it is shown, EXIF orientation applied.
        width_px: As above.
    """

    place: Place
    caption: str
    height_px: int
    width_px: int

    def identity(self) -> list[object]:
        """What tells this picture from a later one of the same name; for cache keys."""
        place = self.place
        return [place.name, place.start, place.num_bytes, place.modified_ns]


@dataclass(frozen=True, slots=True)
class PictureList:
    """The pictures of a source, in a fixed order.

    Attributes:
        pictures: All that can be used.
        skipped: Bad ones that were left out.
        source: Where they are from.
    """

    pictures: tuple[Picture, ...]
    skipped: int
    source: str

    def captions(self) -> PromptList:
        """Every caption once, in the order of their first pictures."""
        return unique_prompts([picture.caption for picture in self.pictures], self.source)


def unique_prompts(prompts: Sequence[str], source: str) -> PromptList:
    """The list without repetitions."""
    return PromptList(tuple(dict.fromkeys(prompts)), source=f"captions of {source}")


class _Section(io.RawIOBase):
    """A stretch of a file as a file of its own, so that headers are read without the rest."""

    def __init__(self, file: BinaryIO, start: int, num_bytes: int) -> None:
        super().__init__()
        self._file, self._start, self._num_bytes, self._position = file, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = max(0, min(len(buffer), self._num_bytes - self._position))
        self._file.seek(self._start + self._position)
        found = self._file.read(length)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def measured(place: Place, caption: str) -> Picture:
    """The picture at a place, its header read.

    Raises:
        BadRowError: No picture.
    """
    with _opened(place) as image:
        # Pillow would decode a whole PNG to see whether EXIF data follows the pixels.
        is_plain = image.format == "PNG" and "exif" not in image.info
        turned = not is_plain and image.getexif().get(ORIENTATION) in SIDEWAYS
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return Picture(place, caption, height, width)


def decoded(place: Place) -> Image.Image:
    """The picture as RGB, turned as its EXIF data says; what is transparent lies on white.

    Raises:
        BadRowError: It is damaged, or has more than 8 bits per channel.
    """
    with _opened(place) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in DEEP_MODES:
            raise BadRowError(place.where, f"has mode {upright.mode}; wanted 8 bits a channel")
        return _on_white(upright)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert("RGB")


@contextmanager
def _opened(place: Place) -> Iterator[Image.Image]:
    """The picture at a place, not decoded yet; whatever Pillow raises inside becomes a bad row."""
    try:
        with place.file.open("rb") as file:
            section = _Section(file, place.start, place.num_bytes)
            with Image.open(io.BufferedReader(section)) as image:
                yield image
    except BadRowError:
        raise
    except UnidentifiedImageError as error:  # its message is the name of our file object
        raise BadRowError(place.where, "is of no picture format that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise their own kinds
        raise BadRowError(place.where, f"cannot be read as a picture ({error})") from error
