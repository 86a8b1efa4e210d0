"""Curves of the comparison: distance against step count, and loss health during training."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 the backend must be chosen first

from fewstep.trainer.compare.entries import DEFAULTS, MAIN, STEPS  # noqa: E402
from fewstep.trainer.compare.page import Result, own_frechet  # noqa: E402


def save_curves(file: Path, results: Sequence[Result], title: str) -> None:
    """Frechet distance and recall over 1, 2, 4, 8 steps, the main methods in colour.

    Args:
        file: PNG to write.
        results: Of one teacher.
        title: Above the picture.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result["name"]].append(result)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for name in sorted(groups, key=lambda name: own_frechet(groups[name])):
        is_main = name in MAIN or name in DEFAULTS
        for axis, key in zip(axes, ("frechet", "recall"), strict=True):
            means = [
                statistics.fmean(r["scores"][str(n)][key] for r in groups[name]) for n in STEPS
            ]
            axis.plot(
                STEPS,
                means,
                marker="o",
                ms=3,
                lw=1.6 if is_main else 0.7,
                color=None if is_main else "0.75",
                label=name if is_main else None,
                zorder=2 if is_main else 1,
            )
    for axis, label in zip(axes, ("Frechet distance (lower is better)", "recall"), strict=True):
        axis.set(xscale="log", xticks=STEPS, xticklabels=STEPS, xlabel="steps", title=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
