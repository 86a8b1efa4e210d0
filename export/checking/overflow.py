"""Where a graph makes NaN or infinity, and how near it comes to the end of half precision."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ValueInfoProto

from fewstep.errors import ExportFolderError
from fewstep.runtime.session import Feeds

HALF_MAX = 65504.0
AT_ONCE = 48
"""Intermediate values looked at in one run: all at once would keep them all in memory."""
FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found.

    Attributes:
        values: How many floating point values were looked at.
        largest: The largest magnitude among finite numbers.
        largest_at: Name of that value.
        bad: Names of values with NaN or infinity.
        bad_outputs: Those of them that leave the graph.
    """

    values: int
    largest: float
    largest_at: str
    bad: tuple[str, ...]
    bad_outputs: tuple[str, ...]


def scan(file: Path, calls: Sequence[Feeds]) -> Scan:
    """Run a graph, every value of it an output, nothing fused.

    Args:
        file: The graph, weights beside it.
        calls: Inputs of each call.

    Raises:
        ExportFolderError: The graph cannot be loaded.
    """
    model = onnx.load(file, load_external_data=False)
    outputs = [output.name for output in model.graph.output]
    inner = [name for node in model.graph.node for name in node.output if name]
    names = [*outputs, *(name for name in dict.fromkeys(inner) if name not in set(outputs))]
    largest, largest_at = 0.0, ""
    seen: dict[str, None] = {}  # a set in order
    bad: dict[str, None] = {}
    for start in range(0, len(names), AT_ONCE):
        for name, value in _values(model, file.parent, names[start : start + AT_ONCE], calls):
            if not np.issubdtype(value.dtype, np.floating) or not value.size:
                continue
            seen[name] = None
            finite = np.isfinite(value)
            if not finite.all():
                bad[name] = None
            top = float(np.abs(np.where(finite, value, 0)).max())
            if top > largest:
                largest, largest_at = top, name
    leaving = tuple(name for name in bad if name in set(outputs))
    return Scan(len(seen), largest, largest_at, tuple(bad), leaving)


def _values(
    model: onnx.ModelProto, folder: Path, names: list[str], calls: Sequence[Feeds]
) -> Iterator[tuple[str, np.ndarray]]:
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    typed = {value.name: value for value in model.graph.value_info}
    wider.graph.output.extend(
        typed.get(name, ValueInfoProto(name=name)) for name in names if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(FOLDER, str(folder.absolute()))
    try:
        session = ort.InferenceSession(
            wider.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for feeds in calls:
            found: Any = session.run(names, dict(feeds))
            yield from zip(names, found, strict=True)
    except Exception as error:  # ONNX Runtime's exceptions share no class of their own
        first = str(error).strip().splitlines()[0][:300]
        raise ExportFolderError(f"{folder} cannot be scanned ({first}); export again") from error
