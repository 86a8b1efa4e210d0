"""Run an export command in a process whose files may not grow beyond a size, as on a full disk.

    python -m tests.export.full_disk LIMIT WHERE COMMAND...

LIMIT is in bytes. WHERE is the function, "module:name" or "module:Class.name", whose first call
sets it; what was written before is whole. Writes beyond it fail in the kernel, with EFBIG.
"""

import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fewstep.export.__main__ import main


def limit_files(num_bytes: int) -> None:
    """Let every further write beyond this size fail."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the call fails, the process lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def limited_at(where: str, num_bytes: int) -> None:
    """Set the limit when a function is first called."""
    module, _, path = where.partition(":")
    place, _, name = path.rpartition(".")
    owner: Any = import_module(module)
    owner = getattr(owner, place) if place else owner
    function: Callable[..., Any] = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        limit_files(num_bytes)
        return function(*given, **named)

    setattr(owner, name, called)


if __name__ == "__main__":
    limited_at(sys.argv[2], int(sys.argv[1]))
    sys.exit(main(sys.argv[3:]))
