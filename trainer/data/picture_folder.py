"""A folder of pictures, with captions in .txt files beside them or in one metadata.jsonl."""

from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import ConfigError
from fewstep.trainer.data.pictures import SUFFIXES, Picture, Place, measured
from fewstep.trainer.data.rows import BadRowError, BadRows, checked_text, known_key
from fewstep.trainer.data.text_rows import BOM, json_rows

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"


def folder_pictures(folder: Path, column: str, bad: BadRows) -> Iterator[Picture]:
    """Pictures of a folder and its sub-folders, measured one by one.

    Args:
        folder: With `metadata.jsonl` at its top (the `datasets` imagefolder layout: file_name and
            a caption), in its order; without it, by path, each with a .txt of its name beside it.
        column: The caption's key in metadata.jsonl; "" takes prompt, text or caption.
        bad: Meets pictures that cannot be read or have no caption.

    Raises:
        ConfigError: A column is named where there is no metadata.jsonl.
    """
    if (folder / METADATA).is_file():
        yield from _listed(folder, column, bad)
        return
    if column:
        raise ConfigError(f"{folder} has no {METADATA}, so no column {column}; leave it empty")
    for file in picture_files(folder):
        try:
            yield _captioned(folder, file)
        except BadRowError as error:
            bad.meet(error)


def has_pictures(path: Path) -> bool:
    """Whether this is a folder with at least one picture somewhere below it."""
    return path.is_dir() and next(_pictures_below(path), None) is not None


def picture_files(folder: Path) -> list[Path]:
    """Every picture below a folder, by path; hidden files and folders are left out."""
    found = _pictures_below(folder)
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _pictures_below(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            yield file


def _captioned(folder: Path, file: Path) -> Picture:
    beside = file.with_suffix(".txt")
    try:
        text = beside.read_bytes().removeprefix(BOM).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise BadRowError(
            str(file), f"has no caption; wanted {beside.name} beside it or a {METADATA} on top"
        ) from error
    caption = checked_text(text, str(beside), "the caption")
    return measured(Place.of_file(file, file.relative_to(folder).as_posix()), caption)


def _listed(folder: Path, column: str, bad: BadRows) -> Iterator[Picture]:
    seen: set[Path] = set()
    chosen = column
    for row in json_rows(folder / METADATA):
        chosen = chosen or known_key(row.values)
        try:
            file = folder / row.text(FILE_NAME)
            if not file.is_file():
                raise BadRowError(row.where, f"names {file.name}, which is not there")
            seen.add(file)
            caption = row.text(chosen)
            picture = measured(Place.of_file(file, file.relative_to(folder).as_posix()), caption)
        except BadRowError as error:
            if error.where == row.where:
                error = BadRowError(f"{folder / METADATA}, {row.where}", error.problem)
            bad.meet(error)
        else:
            yield picture
    for file in picture_files(folder):
        if file not in seen:
            bad.meet(BadRowError(str(file), f"is not listed in {METADATA}"))
