"""How much memory a graph asks for, counted from its shapes before anything is built.

Counted, not measured: TensorRT fuses operators, so its activations are usually fewer, and it adds
scratch memory up to the workspace limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

FOLDED_BYTES = 1 << 10
"""Constants up to this size are looked at to compute shapes; larger ones are weights."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Counted bytes at the largest sizes.

    Attributes:
        weights: Of all weights.
        activations: Largest sum of values alive at once, without fusion.
        inputs_and_outputs: Buffers of a session: inputs once, outputs twice.
        unknown: Values whose size could not be told, left out of `activations`.
        values: Values in all.
    """

    weights: int
    activations: int
    inputs_and_outputs: int
    unknown: int
    values: int

    @property
    def total(self) -> int:
        """Sum of the counted bytes."""
        return self.weights + self.activations + self.inputs_and_outputs


def estimate_memory(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> MemoryEstimate:
    """Count at given input shapes.

    Args:
        path: Of the ONNX file; weights are not read.
        shapes: Input -> shape.
    """
    model = ir.load(path)
    graph = model.graph
    weights = sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if (value.const_value is not None)
    )
    _set_shapes(graph, shapes)
    fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLDED_BYTES,
        output_size_limit=FOLDED_BYTES,
    )
    inner = [value for node in graph for value in node.outputs if value.name]
    moving = [value for value in inner if value.const_value is None]
    return MemoryEstimate(
        weights=weights,
        activations=_peak(graph, set(moving) - set(graph.outputs)),
        inputs_and_outputs=_sum(graph.inputs) + 2 * _sum(graph.outputs),
        unknown=sum(_bytes(value) is None for value in moving),
        values=len(moving),
    )


def _set_shapes(graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for value in graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    for node in graph:
        for value in node.outputs:  # those on file were inferred for other sizes
            value.shape = None


def _sum(values: Iterable[ir.Value]) -> int:
    return sum(_bytes(value) or 0 for value in values)


def _peak(graph: ir.Graph, counted: set[ir.Value]) -> int:
    nodes = list(graph)
    last_use = {value: at for at, node in enumerate(nodes) for value in node.inputs}
    alive = peak = 0
    for at, node in enumerate(nodes):
        alive += _sum(value for value in node.outputs if value in counted)
        peak = max(peak, alive)
        ended = {v for v in (*node.inputs, *node.outputs) if v is not None and v in counted}
        alive -= _sum(value for value in ended if last_use.get(value, at) == at)
    return peak


def _bytes(value: ir.Value) -> int | None:
    """Size of a value; None where its shape or type is unknown."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    return -(-prod(value.shape.numpy()) * value.dtype.bitwidth // 8)
