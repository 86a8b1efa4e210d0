"""Export folders that ComfyUI offers, and when one has changed. No ComfyUI, no engine."""

from collections.abc import Iterable, Iterator
from pathlib import Path

KIND = "fewstep"
"""Sub-folder of ComfyUI's models folder, and key in extra_model_paths.yaml."""

MARK = "manifest.json"
"""What makes a folder an export."""

DEPTH = 3
"""How far below models/fewstep an export may lie."""


def exports_under(roots: Iterable[Path]) -> dict[str, Path]:
    """Exports by name, sorted; of two with one name the earlier root's counts.

    Args:
        roots: Folders to look in; those that are not there are passed over.

    Returns:
        Path below its root, with forward slashes -> folder.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder in _exports(root, DEPTH):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    return dict(sorted(found.items()))


def state_of(folder: Path) -> str:
    """Changes when the export is made again; the manifest holds the checksums of the rest."""
    try:
        stat = (folder / MARK).stat()
    except OSError:
        return "missing"
    return f"{stat.st_mtime_ns}:{stat.st_size}"


def _exports(folder: Path, depth: int) -> Iterator[Path]:
    if depth == 0 or not folder.is_dir():
        return
    for inner in sorted(folder.iterdir()):
        if (inner / MARK).is_file():
            yield inner
        elif inner.is_dir():
            yield from _exports(inner, depth - 1)
