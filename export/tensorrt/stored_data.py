"""Weights on disk: present, whole, inside the folder; integers that TensorRT can index with."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from onnx import TensorProto

from fewstep.export.tensorrt.graph import ReadGraph
from fewstep.export.tensorrt.node_rules import constant_value

SMALL = 1 << 16
"""Integer constants of up to this many values are looked at; larger ones are no sizes."""
INT32 = np.iinfo(np.int32)
UNBOUNDED = frozenset({"Slice"})
"""Operators that take "up to the end" as the largest int64."""


def check_stored_data(read: ReadGraph) -> Iterator[tuple[str, str]]:
    """What is wrong with the weights.

    Yields:
        Name of the weight, and what is wrong with it.
    """
    sizes: dict[Path, int | None] = {}
    for weight in read.graph.initializer:
        if weight.data_location == TensorProto.EXTERNAL:
            wrong = _external(read.path.parent, weight, sizes)
            if wrong:
                yield weight.name, wrong
                continue
        if weight.data_type == TensorProto.INT64 and int(np.prod(weight.dims)) <= SMALL:
            yield from _wide_integers(read, weight)


def _external(folder: Path, weight: TensorProto, sizes: dict[Path, int | None]) -> str | None:
    entries = {entry.key: entry.value for entry in weight.external_data}
    location = entries.get("location", "")
    if not location or PurePosixPath(location).is_absolute() or ".." in location.split("/"):
        return f"its data is said to lie in {location!r}; it must lie beside the graph"
    file = folder / location
    if file not in sizes:
        sizes[file] = file.stat().st_size if file.is_file() else None
    size = sizes[file]
    if size is None:
        return f"{file} with its data is missing; copy it beside the graph, or export again"
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if end > size:
        return f"{file} ends at {size} bytes and its data at {end}; copy it whole, or export again"
    return None


def _wide_integers(read: ReadGraph, weight: TensorProto) -> Iterator[tuple[str, str]]:
    value = constant_value(read, weight.name)
    if value is None or not value.size:
        return
    if INT32.min <= int(value.min()) and int(value.max()) <= INT32.max:
        return
    users = {node.op_type for node in read.graph.node if weight.name in node.input}
    if users - UNBOUNDED:
        yield (
            weight.name,
            (
                f"holds {int(value.min())} to {int(value.max())}, beyond int32, and is used by "
                f"{', '.join(sorted(users))}"
            ),
        )
