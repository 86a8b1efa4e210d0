"""Where the runtime keeps what it can make again: optimised graphs, measured choices."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "FEWSTEP_CACHE"


def cache_folder() -> Path:
    """FEWSTEP_CACHE, or the platform's place for caches; not made yet."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "fewstep"


def key_of(*parts: Any) -> str:
    """A short name for what depends on these values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def machine() -> dict[str, str]:
    """What makes a measured choice, or a graph optimised for a processor, belong to a machine."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags")  # flags: the same model may hide instructions in a guest
    found = {line.partition(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return key_of([found.get(name, "") for name in wanted])


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; a reader never sees a part."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which has the file's own once the block is left.

    Args:
        path: Of the file; its folder is made. The other name has the same ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
