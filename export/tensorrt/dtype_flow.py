"""Types along the graph: a strongly typed network converts nothing by itself."""

from collections.abc import Iterator

import onnx
from onnx import NodeProto

from fewstep.export.tensorrt.graph import ReadGraph, name_of

FORBIDDEN = frozenset({"double", "string", "complex64", "complex128"})


def check_flow(read: ReadGraph) -> Iterator[tuple[str, str]]:
    """Where types are forbidden, unknown, or meet without a Cast.

    Yields:
        Name of a node or value, and what is wrong with it.
    """
    if read.flow_error is not None:
        yield "graph", f"types do not fit: {read.flow_error}"
    for name, kind in sorted(read.types.items()):
        if kind in FORBIDDEN:
            yield name, f"{kind}; TensorRT has no such type, cast to float32 before exporting"
    for node in read.graph.node:
        mixed = _mixed_types(node, read)
        if mixed:
            yield name_of(node), f"{node.op_type} of {' and '.join(mixed)}; put a Cast before it"


def _mixed_types(node: NodeProto, read: ReadGraph) -> list[str]:
    """Types of inputs that the operator's definition wants equal, where they differ."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return []
    schema = onnx.defs.get_schema(node.op_type, read.opset)
    groups: dict[str, list[str]] = {}
    formal = list(schema.inputs)
    for index, name in enumerate(node.input):
        if not formal or not name:
            continue
        port = formal[min(index, len(formal) - 1)]
        is_repeated = index >= len(formal) - 1 and not port.is_homogeneous
        kind = read.types.get(name)
        if kind is not None and not is_repeated and not port.type_str.startswith("tensor("):
            groups.setdefault(port.type_str, []).append(kind)
    different = [sorted(set(kinds)) for kinds in groups.values() if len(set(kinds)) > 1]
    return different[0] if different else []
