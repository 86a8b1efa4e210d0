"""The layers of a graph that can be written in fewer bits, by the name of their parameter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError, ExportFolderError
from fewstep.runtime.weight_forms import TRANSPOSED, parameter_of, stored_names, stored_value

PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Tells ONNX Runtime's quantizers that the graph is as they like it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight and the nodes that multiply by it.

    Attributes:
        name: The parameter's, in the torch module ("model.proj_out.weight").
        weight: The initializer's, with the form it is stored in ("NAME::T"); the four kernels of an
            upsampling convolution are layers of one name.
        nodes: Names of the nodes.
        kind: "MatMul", "Gemm" or "Conv".
        size: In bytes.
    """

    name: str
    weight: str
    nodes: tuple[str, ...]
    kind: str
    size: int


def load_graph(file: Path) -> ir.Model:
    """A graph whose weights stay on disk until they are asked for.

    Raises:
        ExportFolderError: It cannot be read.
    """
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf and onnx_ir share no class of their own
        raise ExportFolderError(f"{file} cannot be read ({error}); export again") from error
    model.metadata_props[PREPARED[0]] = PREPARED[1]
    return model


def split_linear(model: ir.Model) -> None:
    """Write every linear layer as MatMul and Add: some quantizers overlook Gemm."""
    for node in list(model.graph):
        if node.op_type == "Gemm" and _is_linear(node):
            _split(model.graph, node)
    _drop_unused(model.graph)


def layers_of(model: ir.Model, kinds: Sequence[str] = ("MatMul",)) -> tuple[Layer, ...]:
    """Layers of these kinds, in the order they are computed."""
    found: dict[str, Layer] = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in kinds and len(node.inputs) > 1 else None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        assert weight.name is not None
        assert node.name is not None
        known = found.get(weight.name)
        nodes = (*known.nodes, node.name) if known else (node.name,)
        name, size = parameter_of(weight.name), weight.const_value.nbytes
        found[weight.name] = Layer(name, weight.name, nodes, node.op_type, size)
    return tuple(found.values())


def without(layers: Sequence[Layer], patterns: Sequence[str]) -> tuple[Layer, ...]:
    """Layers whose name no pattern is found in.

    Raises:
        ExportError: A pattern is no regular expression, or none of the layers is left.
    """
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ExportError(f"--skip got {error.pattern!r}, no regular expression: {error}") from None
    kept = tuple(layer for layer in layers if not any(p.search(layer.name) for p in compiled))
    if not kept:
        raise ExportError(
            f"--skip {' '.join(patterns)} leaves none of {len(layers)} layers to quantize; skip "
            "fewer"
        )
    return kept


def replace_weights(model: ir.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Put other values into parameters.

    Args:
        model: Its initializers are named by parameter.
        weights: Parameter name -> value as the torch module has it.

    Raises:
        ExportError: A parameter is not in the graph, or of another shape.
    """
    for name, value in weights.items():
        stored = stored_names(name, model.graph.initializers)
        if not stored:
            raise ExportError(f"the graph has no weight {name!r}; was it exported from this base?")
        for form in stored:
            held = model.graph.initializers[form]
            new = stored_value(form, value)
            if held.const_value is None or new.shape != tuple(held.const_value.shape.numpy()):
                raise ExportError(
                    f"{name} has shape {value.shape}, and another in the graph; was it exported "
                    "from this base?"
                )
            held.const_value = ir.tensor(new, name=form)


def _is_linear(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return (
        weight is not None
        and weight.is_initializer()
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
        and not node.attributes.get_int("transA", 0)
    )


def _split(graph: ir.Graph, node: ir.Node) -> None:
    given, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    assert weight is not None
    right = _transposed(graph, weight) if node.attributes.get_int("transB", 0) else weight
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    name = node.name or output.name or "linear"
    product = ir.node("MatMul", [given, right], name=f"{name}_matmul")
    product.outputs[0].name = output.name if bias is None else f"{output.name}_matmul"
    product.outputs[0].type, product.outputs[0].shape = output.type, output.shape
    added = [product]
    if bias is not None:
        added.append(ir.node("Add", [product.outputs[0], bias], name=f"{name}_add"))
        last = added[-1].outputs[0]
        last.name, last.type, last.shape = output.name, output.type, output.shape
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], added, [output], [added[-1].outputs[0]]
    )


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    name = f"{weight.name}{TRANSPOSED}"
    known = graph.initializers.get(name)
    if known is not None:
        return known
    assert weight.const_value is not None
    turned = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=name)
    shape = ir.Shape(turned.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(turned.dtype), const_value=turned)
    graph.register_initializer(value)
    return value


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]
