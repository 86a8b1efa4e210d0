"""An ONNX file as the checks read it: types of all values, what is constant, no weights loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from fewstep.errors import ExportError

TYPE_NAMES = {
    number: name.lower().replace("float8e4m3fn", "float8_e4m3fn")
    for name, number in TensorProto.DataType.items()
}
TYPE_NAMES[TensorProto.FLOAT] = "float32"


@dataclass(frozen=True, slots=True)
class ReadGraph:
    """A graph and what shape inference found.

    Attributes:
        path: Of the file.
        model: Without external data.
        types: Value -> element type, as ONNX numbers it turned into words; unknown ones absent.
        constants: Values that do not depend on inputs.
        flow_error: What strict type inference said, if it refused.
    """

    path: Path
    model: ModelProto
    types: dict[str, str]
    constants: frozenset[str]
    flow_error: str | None

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Of the ai.onnx domain; 0 where it has none."""
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=0)


def read_graph(path: Path) -> ReadGraph:
    """Read a file and infer its types.

    Raises:
        ExportError: It is missing, or not ONNX.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; export the folder again") from None
    except Exception as error:  # protobuf raises several kinds for a damaged file
        raise ExportError(f"{path} is not an ONNX file ({error}); export again") from None
    flow_error = None
    inferred = model
    try:
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except onnx.shape_inference.InferenceError as error:
        flow_error = " ".join(str(error).split())[:300]
        inferred = onnx.shape_inference.infer_shapes(model)
    return ReadGraph(path, model, _types(inferred.graph), _constants(model.graph), flow_error)


def name_of(node: NodeProto) -> str:
    """What to call a node in a message: its name, or its first output's."""
    return node.name or (node.output[0] if node.output else node.op_type)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Graphs inside a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """A node's attribute, or None where it has its default."""
    return next((a for a in node.attribute if a.name == name), None)


def text_attribute(node: NodeProto, name: str, default: str) -> str:
    """A string attribute."""
    found = attribute(node, name)
    return found.s.decode() if found is not None else default


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    found = attribute(node, name)
    return found.i if found is not None else default


def _types(graph: GraphProto) -> dict[str, str]:
    found = {weight.name: TYPE_NAMES[weight.data_type] for weight in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type.elem_type
        if kind:
            found[value.name] = TYPE_NAMES[kind]
    return found


def _constants(graph: GraphProto) -> frozenset[str]:
    fixed = {weight.name for weight in graph.initializer} - {value.name for value in graph.input}
    for node in graph.node:
        is_random = node.op_type.startswith("Random")
        if not is_random and all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    return frozenset(fixed)
