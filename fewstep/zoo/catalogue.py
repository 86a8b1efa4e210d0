"""All entries of the zoo, read from the JSON files beside this module."""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fewstep.errors import RecipeError
from fewstep.zoo.entry import ZooEntry

FOLDER = Path(__file__).parent / "entries"


class UnknownEntryError(RecipeError):
    """The zoo has no entry of this name."""


@cache
def entries() -> tuple[ZooEntry, ...]:
    """Every entry, by name; read and checked at the first call.

    Raises:
        RecipeError: A file of this installation is damaged; the message names it.
    """
    return read_folder(FOLDER)


def read_folder(folder: Path) -> tuple[ZooEntry, ...]:
    """The entries of a folder, by name.

    Raises:
        RecipeError: A file is not an entry; the message names it.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    return tuple(ZooEntry.from_file(path) for path in paths)


def entry(name: str) -> ZooEntry:
    """The entry of this name, with or without "zoo:" before it.

    Reads that entry alone.

    Raises:
        UnknownEntryError: There is none; the message names similar ones.
    """
    name = name.strip().lower().removeprefix("zoo:")
    names = [path.stem for path in sorted(FOLDER.glob("*.json"))]
    if name in names:
        return ZooEntry.from_file(FOLDER / f"{name}.json")
    close = [known for known in names if name and name in known][:3]
    close = close or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}?" if close else "see: fewstep zoo list"
    raise UnknownEntryError(f"the zoo has no entry {name!r}; {meant}")


def search_entries(words: Sequence[str]) -> tuple[ZooEntry, ...]:
    """Entries that have every word in their name, title, family, files, bases or notes."""
    wanted = [word.lower() for word in words]
    return tuple(e for e in entries() if all(word in _text(e) for word in wanted))


def _text(found: ZooEntry) -> str:
    parts = [found.name, found.title, found.family, found.kind, found.notes, *found.base]
    parts += [part for file in found.files for part in (file.repo, file.filename or "")]
    return "\n".join(parts).lower()
