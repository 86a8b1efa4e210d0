"""The demo's pictures: the grid of samplers side by side, and the training curves."""

import json
from pathlib import Path

import numpy as np

CURVES = {
    "loss": ("loss/trajectory", "loss/dm", "loss/critic"),
    "health": ("health/dm_cos", "health/dm_rel_gap", "health/mean_drift", "health/std_drift"),
    "Frechet distance": ("eval/frechet",),
    "share": ("eval/accuracy", "eval/recall"),
}


def save_grid(file: Path, rows: dict[str, np.ndarray]) -> None:
    """One row of pictures per sampler, named on the left.

    Args:
        file: PNG to write.
        rows: Name -> pictures, shape (N, 64, 64, 3), uint8; the same N, prompts and seeds in each.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(11, 0.62 * len(rows)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.tight_layout(h_pad=0.15)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def save_curves(file: Path, metrics: Path) -> None:
    """Plot a run's metrics.jsonl: losses, health meters, scores, drawn over optimizer steps."""
    pyplot = _pyplot()
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6))
    for axis, (title, names) in zip(axes.flat, CURVES.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.partition("/")[2], lw=1.0)
        axis.set(title=title, xlabel="step", yscale="log" if title == "loss" else "linear")
        if axis.get_lines():
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _pyplot():  # noqa: ANN202
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
