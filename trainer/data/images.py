"""Pictures or latents for the terms that need data: a folder, tar shards or latent files."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fewstep.errors import ConfigError
from fewstep.trainer.data.latent_files import LatentFiles, read_latent_file
from fewstep.trainer.data.picture_folder import folder_pictures, has_pictures
from fewstep.trainer.data.pictures import Picture, PictureList
from fewstep.trainer.data.rows import BadRows
from fewstep.trainer.data.tar_shards import shard_pictures

WANTED = "a folder of pictures, .tar shards (file or folder) or .safetensors latents (likewise)"

ImageSource = PictureList | LatentFiles


def read_images(
    source: str, *, column: str = "", skip_bad: bool = False, limit: int = 0
) -> ImageSource:
    """Find the pictures or latents of a source and read their headers and captions.

    Args:
        source: A folder of pictures with captions, a .tar file or a folder of them (webdataset),
            a .safetensors file of latents or a folder of them.
        column: The caption's key in metadata.jsonl or .json members; "" takes prompt, text or
            caption.
        skip_bad: Count bad pictures and warn once, instead of raising at the first.
        limit: Stop after so many pictures; 0 reads all. Not for latents.

    Raises:
        ConfigError: Nothing usable is there, kinds are mixed, or a picture, caption or row is bad:
            the message names the file, the member or the row.
    """
    path = Path(source).expanduser()
    if limit < 0:
        raise ConfigError(f"limit must be 0 (all pictures) or more, got {limit}")
    if not path.exists():
        raise ConfigError(f"{source} does not exist; give {WANTED}")
    shards, latents = _files(path, ".tar"), _files(path, ".safetensors")
    _check_one_kind(source, pictures=has_pictures(path), shards=shards, latents=latents)
    bad = BadRows(source, skip=skip_bad)
    if latents:
        if column or limit:
            raise ConfigError(f"{source} holds latents, which take no column and no limit")
        return _latents(latents, source, bad)
    pictures = _of_shards(shards, column, bad) if shards else folder_pictures(path, column, bad)
    found = tuple(islice(pictures, limit or None))
    if not found:
        raise bad.nothing_left("pictures")
    bad.warn()
    return PictureList(found, bad.count, source)


def _files(path: Path, suffix: str) -> list[Path]:
    """The path itself, or the files of a folder, by name, that have a suffix."""
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in candidates if file.suffix.lower() == suffix and file.is_file()]


def _check_one_kind(
    source: str, *, pictures: bool, shards: list[Path], latents: list[Path]
) -> None:
    there = {"pictures": pictures, ".tar shards": shards, ".safetensors latents": latents}
    found = [name for name, has_some in there.items() if has_some]
    if len(found) != 1:
        holds = " and ".join(found) if found else "neither pictures, shards nor latents"
        raise ConfigError(f"{source} holds {holds}; give {WANTED}")


def _of_shards(shards: list[Path], column: str, bad: BadRows) -> Iterator[Picture]:
    for shard in shards:
        yield from shard_pictures(shard, column, bad)


def _latents(paths: list[Path], source: str, bad: BadRows) -> LatentFiles:
    files = tuple(read_latent_file(path, bad) for path in paths)
    if not any(file.prompts for file in files):
        raise bad.nothing_left("latents")
    bad.warn()
    return LatentFiles(files, bad.count, source)
