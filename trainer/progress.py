"""The progress bar of a run: stage, losses, health and time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fewstep.trainer.run import Metrics, Run

SHOWN = {
    "loss/trajectory": "trajectory",
    "loss/dm": "dm",
    "loss/critic": "critic",
    "health/dm_cos": "dm_cos",
    "health/dm_rel_gap": "dm_rel_gap",
    "eval/frechet": "Frechet",
}


class TrainProgress:
    """Shows each step's metrics beside a bar with the time left.

    Args:
        console: Where to draw.
        is_quiet: Draw nothing.
    """

    def __init__(self, console: Console, *, is_quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=is_quiet,
        )
        self._task = self._progress.add_task("distilling", total=1.0, metrics="")
        self._last: Metrics = {}

    def report(self, run: Run, metrics: Metrics) -> None:
        """Show one step."""
        self._last |= metrics
        stage = run.stages[int(metrics["stage"])].name
        shown = [f"{label} {self._last[k]:.3g}" for k, label in SHOWN.items() if k in self._last]
        self._progress.update(
            self._task,
            completed=run.total_progress,
            description=f"{stage}, step {run.step}",
            metrics="  ".join(shown),
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
