"""What is seen of a folder's graphs without anything to hold them against."""

from collections.abc import Callable, Mapping

import numpy as np

from fewstep.export.checking.kernels import uncovered
from fewstep.export.checking.overflow import HALF_MAX, scan
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds

Progress = Callable[[str], None]


def inspect(
    folder: ExportFolder, feeds: Mapping[str, list[Feeds]], progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems and notes that need no reference.

    Args:
        folder: Whose graphs.
        feeds: Inputs of each component, as they were given in a drawing.
        progress: Told what is being done.
    """
    problems: list[str] = []
    notes: list[str] = []
    for name, graph in folder.manifest.graphs.items():
        file = folder.root / graph.file
        missing = uncovered(file)
        if missing:
            notes.append(f"{name}: ONNX Runtime has no CPU kernel of its own for {missing}")
        if name in feeds:
            progress(f"scanning {name}")
            seen = scan(file, as_typed(feeds[name][-1], graph))
            notes.append(_seen(name, seen.values, seen.largest, seen.largest_at))
            if seen.bad_outputs:
                problems.append(f"{name} gives numbers that are none in {seen.bad_outputs}")
            elif seen.bad:
                notes.append(f"{name}: NaN or infinity inside, none in its outputs: {seen.bad[:4]}")
    return tuple(problems), tuple(notes)


def _seen(name: str, count: int, largest: float, where: str) -> str:
    text = f"{name}: {count} values looked at, the largest is {largest:.4g} ({where})"
    return f"{text}, which overflows in half precision" if largest > HALF_MAX else text


def as_typed(feeds: Feeds, graph: Graph) -> dict[str, np.ndarray]:
    """Inputs in a graph's element types."""
    types = {tensor.name: tensor.dtype for tensor in graph.inputs}
    return {name: np.asarray(value, types[name]) for name, value in feeds.items()}
