"""Short names of the teachers that ship inside fewstep."""

from pathlib import Path
from typing import Literal

SHIPPED: dict[str, Literal["sd3", "sd15"]] = {"digits-sd3": "sd3", "digits-sd15": "sd15"}


def resolve_base(base: str) -> str:
    """A folder or Hub id: shipped names become their folder, everything else stays what it is.

    Raises:
        FewstepError: The shipped weights are missing from this installation.
    """
    if base not in SHIPPED or Path(base).exists():
        return base
    from fewstep.digits.weights import teacher_folder

    return str(teacher_folder(SHIPPED[base]))
