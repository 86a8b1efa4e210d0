"""How large the inputs of layers become along trajectories, found by ONNX Runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from fewstep.export.quantizing.layers import Layer, load_graph
from fewstep.runtime.session import Feeds

HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Seen:
    """The inputs of one layer.

    Attributes:
        largest: Magnitude over all calls.
        ranks: Numbers of axes it had, each once.
    """

    largest: float
    ranks: tuple[int, ...]


def input_ranges(source: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]) -> dict[str, Seen]:
    """Run a graph and look at what its layers are given.

    Args:
        source: The graph, saved; another file is made beside it.
        layers: Of which the inputs are looked at.
        feeds: One call each.

    Returns:
        Name of a layer -> what was seen of all its nodes' inputs.
    """
    values = _values(source, layers)
    session = _watching(source, sorted({v for names in values.values() for v in names}))
    names = [output.name for output in session.get_outputs()]
    known = {given.name for given in session.get_inputs()}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for given in feeds:
        asked = {name: value for name, value in given.items() if name in known}
        for name, value in zip(names, session.run(names, asked), strict=True):
            seen[name].append(np.asarray(value))
    return {
        layer: Seen(
            largest=max(float(v) for name in found for v in seen[f"{name}_largest"]),
            ranks=tuple(sorted({v.size for name in found for v in seen[f"{name}_shape"]})),
        )
        for layer, found in values.items()
    }


def _values(source: Path, layers: Sequence[Layer]) -> dict[str, list[str]]:
    nodes = {node.name: node for node in load_graph(source).graph}
    found: dict[str, list[str]] = {}
    for layer in layers:
        inputs = [nodes[name].inputs[0] for name in layer.nodes]
        found[layer.name] = sorted({value.name for value in inputs if value and value.name})
    return found


def _watching(source: Path, values: Sequence[str]) -> ort.InferenceSession:
    """The graph with the largest magnitude and the shape of values as its only outputs."""
    model = load_graph(source)
    known = {value.name: value for node in model.graph for value in node.outputs}
    known |= {value.name: value for value in model.graph.inputs}
    model.graph.outputs.clear()
    for name in values:
        size = ir.node("Abs", [known[name]])
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        shape = ir.node("Shape", [known[name]])
        size.outputs[0].name = f"{name}_abs"
        for node, suffix, kind in ((largest, "largest", "FLOAT"), (shape, "shape", "INT64")):
            node.outputs[0].name = f"{name}_{suffix}"
            node.outputs[0].type = ir.TensorType(ir.DataType[kind])
        model.graph.extend([size, largest, shape])
        model.graph.outputs.extend([*largest.outputs, *shape.outputs])
    file = source.with_name("ranges.onnx")
    ir.save(model, file, external_data=f"{file.name}_data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
