"""One component beside its rounded double: inputs of the double's own way, and the difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.export.checking.torch_engine import TorchSession
from fewstep.export.part import Part, Port
from fewstep.export.quantizing.trajectories import record
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds, Loader, Session

BATCH = 8
"""Calls looked at in one step, all at the same level."""
HELD_SEED = 2**31
"""First seed of the trajectories that the error is measured on; training stays below.

Noise knows the lower 32 bits of a seed: these are the upper half of all streams.
"""


@dataclass(slots=True)
class StudentLoader:
    """One component run by torch, the others as they are in the folder.

    Attributes:
        own: Of the component.
        others: Loads the rest.
        name: Of the engine.
    """

    own: Session
    others: Loader
    name: str = "student"

    def load(self, graph: Graph) -> Session:
        """See `Loader.load`."""
        return self.own if graph.file == self.own.graph.file else self.others.load(graph)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One component in training.

    Attributes:
        folder: Float folder.
        name: Of the component.
        teacher: Float, frozen.
        student: The same with rounding layers.
        prompts: Where trajectories begin.
        loader: Of the folder.
    """

    folder: ExportFolder
    name: str
    teacher: Part
    student: Part
    prompts: Sequence[str]
    loader: Loader

    def feeds(self, seed: int) -> list[list[Feeds]]:
        """Inputs along the student's own trajectories: per step, one entry per picture."""
        graph = self.folder.manifest.graphs[self.name]
        own = StudentLoader(TorchSession(self.student, graph), self.loader)
        calls = record(self.folder, own, self.prompts, seed=seed)[self.name]
        each = len(calls) // len(self.prompts)
        return [calls[step::each] for step in range(each)]

    def gap(self, feeds: Sequence[Feeds]) -> Tensor:
        """Mean square of the difference, relative to that of the float answer.

        Calls that cannot go side by side, as of prompts of other lengths, go one after the other;
        each call weighs the same.
        """
        each = [
            self._gap(_batch(self.teacher, alike)) * len(alike)
            for alike in _alike(self.teacher, feeds)
        ]
        return torch.stack(each).sum() / len(feeds)

    def _gap(self, given: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = _first(self.teacher.module(*given))
        found = _first(self.student.module(*given))
        return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)

    def error(self, feeds: Sequence[Sequence[Feeds]]) -> float:
        """Root mean square of the difference over all steps, relative."""
        with torch.no_grad():
            each = [float(self.gap(some[:BATCH])) for some in feeds]
        return float(np.sqrt(np.mean(each)))


def lesson_seed(step: int, pictures: int) -> int:
    """First seed of a recording in training: new in every one, and none reaches `HELD_SEED`."""
    return step * pictures % (HELD_SEED - pictures + 1)


def _alike(part: Part, feeds: Sequence[Feeds]) -> list[list[Feeds]]:
    """Calls in groups that can be made at once: one shape, and one value of what has no batch."""
    groups: dict[tuple[object, ...], list[Feeds]] = {}
    for feed in feeds:
        key = tuple(
            (feed[port.name].shape, None if _has_batch(port) else feed[port.name].tobytes())
            for port in part.inputs
        )
        groups.setdefault(key, []).append(feed)
    return list(groups.values())


def _batch(part: Part, feeds: Sequence[Feeds]) -> list[Tensor]:
    """Calls side by side; what has no batch axis is the same in all of them."""
    found = []
    for port in part.inputs:
        values = [feed[port.name] for feed in feeds]
        found.append(torch.from_numpy(np.concatenate(values) if _has_batch(port) else values[0]))
    return found


def _has_batch(port: Port) -> bool:
    return bool(port.dims) and port.dims[0] == "batch_size"


def _first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer
