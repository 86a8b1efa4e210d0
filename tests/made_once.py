"""Folders that are slow to make: one process of a test run makes each, the others read it."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock

VARIABLE = "FEWSTEP_TEST_RUN"
"""Folder of this run; tests/conftest.py sets it before processes start, and removes it."""


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of a name; only to be read.

    Args:
        name: One per content.
        make: Fills an empty folder.
    """
    root = Path(os.environ.get(VARIABLE) or mkdtemp(prefix="fewstep-test-"))
    os.environ[VARIABLE] = str(root)  # where tests are used without pytest
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            partial = Path(mkdtemp(dir=root))
            make(partial)
            partial.rename(folder)
    return folder
