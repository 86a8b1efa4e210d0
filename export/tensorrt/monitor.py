"""A progress bar for a build, and a way to stop it.

TensorRT calls back after every step of every phase; answering False stops the build cleanly.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.progress import Progress, TaskID

from fewstep.runtime.tensorrt.library import library


class BuildProgress:
    """Phases of a build as bars, inner phases below outer ones.

    Args:
        bars: Shows them.
        is_cancelled: Asked after every step.
    """

    def __init__(self, bars: Progress, is_cancelled: Callable[[], bool]) -> None:
        self._bars = bars
        self._is_cancelled = is_cancelled
        self._tasks: dict[str, TaskID] = {}
        self._depths: dict[str, int] = {}
        self._lock = threading.Lock()  # TensorRT calls from several threads

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._depths[phase] = self._depths.get(parent, -1) + 1 if parent else 0
            self._tasks[phase] = self._bars.add_task(
                f"{'  ' * self._depths[phase]}{phase}", total=steps
            )

    def step(self, phase: str, step: int) -> bool:
        """A step is done.

        Returns:
            Whether to go on.
        """
        with self._lock:
            if phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=step + 1)
        return not self._is_cancelled()

    def finish(self, phase: str) -> None:
        """A phase has ended, done or stopped."""
        with self._lock:
            self._depths.pop(phase, None)
            task = self._tasks.pop(phase, None)
            if task is not None:
                self._bars.remove_task(task)


def make_monitor(progress: BuildProgress) -> Any:
    """A `trt.IProgressMonitor` that reports to the bars."""
    trt = library()

    class Monitor(trt.IProgressMonitor):
        """Called by TensorRT."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False stops the build."""
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            """A phase has ended."""
            progress.finish(phase_name)

    return Monitor()


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, as an exception must not cross TensorRT's C++ code."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may set handlers; somebody else stops it
        return

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
