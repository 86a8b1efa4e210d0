"""A compiled graph in a file, read in place: its pages are lent, and given back once copied."""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

INTERVAL_S = 0.02


class MappedBlob:
    """A file mapped into memory, private to this process.

    An engine that arranges weights in a layout of its own needs the file once, at the first call.
    Until they are given back, pages that were read count as this process's memory.

    Args:
        path: The file, not empty. It must not be changed while this exists.

    Attributes:
        values: Its bytes; keep this object as long as they are used.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.values = np.frombuffer(self._mapping, np.uint8)

    def give_back(self) -> None:
        """Let go of the pages in memory; bytes that are asked for again are read again."""
        advice = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
        if advice is not None:
            self._mapping.madvise(advice)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Pages that are read inside the block are given back soon, and all of them at its end."""
        done = threading.Event()

        def give_back() -> None:
            while not done.wait(INTERVAL_S):
                self.give_back()

        thread = threading.Thread(target=give_back, name="fewstep-pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.give_back()
