"""Which layers stay in floating point."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.errors import ExportError

ALWAYS: tuple[str, ...] = (
    r"(^|\.)proj_out\.",
    r"(^|\.)conv_(in|out)\.",
    r"(^|\.)pos_embed\.",
    r"(^|\.)x_embedder\.",
)
"""First and last layers: few weights, and their error goes straight into the picture."""
AUTO = re.compile(r"auto:(\d+)")
BUDGET = re.compile(r"budget:([0-9.eE+-]+)")


@dataclass(frozen=True, slots=True)
class Skips:
    """What `--skip` asks for.

    Attributes:
        patterns: Layers whose name one of these is found in.
        worst: How many of the most sensitive layers are skipped as well.
        budget: Skip the most sensitive until the rest is expected below this relative error.
    """

    patterns: tuple[str, ...] = ALWAYS
    worst: int = 0
    budget: float | None = None

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the layers have to be measured first."""
        return self.worst > 0 or self.budget is not None


def parse_skips(words: Sequence[str]) -> Skips:
    """Read `--skip`.

    Args:
        words: Regular expressions, "auto:K", "budget:E", or "none" alone.

    Raises:
        ExportError: A number is missing or wrong.
    """
    if list(words) == ["none"]:
        return Skips(patterns=())
    patterns, worst, budget = list(ALWAYS), 0, None
    for word in words:
        if found := AUTO.fullmatch(word):
            worst = int(found.group(1))
        elif found := BUDGET.fullmatch(word):
            budget = _positive(word, found.group(1))
        elif word == "none" or word.startswith(("auto:", "budget:")):
            raise ExportError(
                f"--skip got {word!r}; use regular expressions, auto:K with a number of layers, "
                "budget:E with a relative error, or none alone"
            )
        else:
            patterns.append(word)
    return Skips(tuple(patterns), worst, budget)


def _positive(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0.0:
        raise ExportError(f"--skip got {word!r}; a budget is a relative error above 0")
    return value
