"""The GPU an engine is for: "sm90" on the command line."""

import re
from dataclasses import dataclass

from fewstep.errors import ExportError

ARCHITECTURES = {
    (7, 5): "Turing",
    (8, 0): "Ampere, data centre",
    (8, 6): "Ampere",
    (8, 7): "Jetson Orin",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell, data centre",
    (10, 3): "Blackwell Ultra",
    (12, 0): "Blackwell",
    (12, 1): "DGX Spark",
}
"""Compute capability -> name, for the help and for messages."""


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture.

    Attributes:
        major: Of the compute capability.
        minor: Of the compute capability.
    """

    major: int
    minor: int

    @property
    def sm(self) -> str:
        """As written on the command line."""
        return f"sm{self.major}{self.minor}"

    @property
    def name(self) -> str:
        """For people."""
        return ARCHITECTURES[(self.major, self.minor)]


def parse_target(text: str) -> Target:
    """Read "sm90".

    Raises:
        ExportError: It is no architecture TensorRT builds for.
    """
    match = re.fullmatch(r"sm_?(\d{1,2})(\d)", text.strip().lower())
    found = (int(match[1]), int(match[2])) if match else None
    if found not in ARCHITECTURES:
        known = ", ".join(f"sm{major}{minor}" for major, minor in ARCHITECTURES)
        raise ExportError(
            f"--target is {text!r}, wanted one of {known}; `nvidia-smi --query-gpu=compute_cap "
            "--format=csv` prints 9.0 for sm90"
        )
    return Target(*found)
