"""Results as tables of docs/methods.md, between the page's own markers."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import ConfigError
from fewstep.trainer.compare.entries import STEPS
from fewstep.trainer.run_folder import write_text

Result = dict[str, Any]


def write_tables(page: Path, results: Sequence[Result]) -> None:
    """Put each teacher's table between its markers.

    Raises:
        ConfigError: The page has no place for a teacher.
    """
    text = page.read_text(encoding="utf-8")
    for model in sorted({result["model"] for result in results}):
        pattern = rf"(<!-- trained: {model} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ConfigError(
                f"{page} has no '<!-- trained: {model} -->' ... '<!-- end -->' to write between"
            )
        rows = table([r for r in results if r["model"] == model])
        text = re.sub(pattern, lambda m, rows=rows: m[1] + rows + m[2], text, flags=re.DOTALL)
    write_text(page, text)


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per method, best Frechet distance at its own step count first."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result["name"]].append(result)
    heads = ["method", "made for", *(f"Frechet at {n}" for n in STEPS)]
    heads += ["accuracy", "recall", "diversity", "calls", "steps", "minutes", "GiB", "seeds"]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for name in sorted(groups, key=lambda name: own_frechet(groups[name])):
        lines.append(" | ".join(_cells(name, groups[name])))
    return "".join(f"| {line} |\n" for line in lines)


def own_frechet(group: Sequence[Result]) -> float:
    """Mean Frechet distance at the most steps the student was made for."""
    return statistics.fmean(_own(result)["frechet"] for result in group)


def _own(result: Result) -> dict[str, float]:
    return result["scores"][str(own_steps(result))]


def own_steps(result: Result) -> int:
    """The most steps, of those that are judged, that a student was made for."""
    made_for = [n for n in result["made_for"] if n in STEPS]
    return max(made_for) if made_for else max(STEPS)


def _cells(name: str, group: Sequence[Result]) -> list[str]:
    made_for = group[0]["made_for"]
    frechet = []
    for count in STEPS:
        cell = spread([result["scores"][str(count)]["frechet"] for result in group])
        frechet.append(f"**{cell}**" if count in made_for else cell)
    own = [_own(result) for result in group]
    return [
        name,
        ", ".join(map(str, made_for)),
        *frechet,
        *(spread([scores[key] for scores in own], 3) for key in ("accuracy", "recall")),
        spread([scores["diversity"] for scores in own]),
        str(own_steps(group[0])),
        f"{statistics.fmean(result['steps'] for result in group):.0f}",
        f"{statistics.fmean(result['minutes'] for result in group):.1f}",
        f"{max(result['peak_gib'] or 0.0 for result in group):.2f}",
        str(len(group)),
    ]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the deviation over seeds where there are several."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return "diverged"
    shown = f"{mean:.{digits}f}"
    return f"{shown} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown
