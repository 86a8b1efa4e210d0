"""What is seen of a folder's graphs without anything to hold them against."""

from collections.abc import Callable

import numpy as np

from fewstep.export.checking.drawing import Drawing
from fewstep.export.checking.kernels import uncovered
from fewstep.export.checking.overflow import HALF_MAX, scan
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds

Progress = Callable[[str], None]
FUSED = "fused"


def inspect(
    folder: ExportFolder, drawing: Drawing, progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems and notes that need no reference.

    Every value inside every component is looked at, in the first and the last of its calls. The
    fused graph is made of the same nodes: its pixels are held against theirs elsewhere.

    Args:
        folder: Whose graphs.
        drawing: By this folder: says what the components are given.
        progress: Told what is being done.
    """
    problems: list[str] = []
    notes: list[str] = []
    for name, graph in folder.manifest.graphs.items():
        file = folder.root / graph.file
        missing = uncovered(file)
        if missing:
            notes.append(f"{name}: ONNX Runtime has no CPU kernel of its own for {missing}")
        if name == FUSED:
            continue
        calls = drawing.feeds_of(name)
        if not calls:
            notes.append(f"{name}: no drawing calls it, nothing inside it was looked at")
            continue
        progress(f"scanning {name}")
        chosen = calls if len(calls) == 1 else [calls[0], calls[-1]]
        seen = scan(file, [as_typed(one, graph) for one in chosen])
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
