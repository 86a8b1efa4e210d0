"""The progress bar of a run: stage, losses, health and time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fewstep.trainer.stages import Metrics

SHOWN = {
    "loss/trajectory": "trajectory",
    "loss/dmd": "dmd",
    "loss/critic": "critic",
    "health/dm_cos": "dm_cos",
    "health/dm_rel_gap": "dm_rel_gap",
    "eval/frechet": "Frechet",
}


class TrainProgress:
    """Shows each step's metrics beside a bar with the time left.

    Args:
        total: Optimizer steps of the run.
        console: Where to draw.
        is_quiet: Draw nothing.
    """

    def __init__(self, total: int, console: Console, *, is_quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=is_quiet,
        )
        self._task = self._progress.add_task("distilling", total=total, metrics="")
        self._last: Metrics = {}

    def report(self, step: int, metrics: Metrics) -> None:
        """Show one step."""
        self._last |= metrics
        stage = "distribution matching" if "loss/dmd" in metrics else "warm start"
        shown = [f"{label} {self._last[k]:.3g}" for k, label in SHOWN.items() if k in self._last]
        self._progress.update(
            self._task, completed=step, description=stage, metrics="  ".join(shown)
        )

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)
