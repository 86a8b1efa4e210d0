"""Where the runtime keeps what it can make again: optimised graphs, measured choices."""

import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "FEWSTEP_CACHE"
OF_A_PROCESSOR = (  # a guest may hide instructions of the same model
    *("model name", "flags"),  # x86
    *("Features", "CPU implementer", "CPU part"),  # Arm has no name
)
"""Lines of /proc/cpuinfo that tell processors apart."""
FORGOTTEN_S = 3600.0
"""What was not written to for so long is of a writer that was killed."""


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
        return processor_of(info.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return platform.processor()


def processor_of(cpuinfo: str) -> str:
    """A short name for the processor, all kinds of cores together, of /proc/cpuinfo's text."""
    lines = {line.strip() for line in cpuinfo.splitlines()}
    return key_of(
        sorted(line for line in lines if line.partition(":")[0].strip() in OF_A_PROCESSOR)
    )


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
    partial = partial_name(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """A name beside `path`, of the same ending, that nobody else writes to.

    Not another thread, and not another container on the same folder, whose process may have the
    same number.
    """
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial{path.suffix}")


def clear_partials(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder of the cache."""
    for partial in folder.glob(".*.partial*"):
        with suppress(OSError):  # somebody else removes it
            inside = [partial, *partial.rglob("*")]
            if time.time() - max(path.stat().st_mtime for path in inside) < FORGOTTEN_S:
                continue
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()
