"""How much memory a graph asks for, counted from its shapes before anything is built.

Counted, not measured: TensorRT fuses operators, so its activations are usually fewer, and it adds
scratch memory up to the workspace limit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from fewstep.export.tensorrt.graph import ReadGraph

BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 64),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16), 16),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
}
"""Element type -> bits; others have 8."""


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


def estimate_memory(read: ReadGraph, shapes: Mapping[str, tuple[int, ...]]) -> MemoryEstimate:
    """Count at given input shapes.

    Args:
        read: The graph.
        shapes: Input -> shape.
    """
    graph = _with_shapes(read.model, shapes).graph
    sizes = _sizes(graph)
    made = {name for node in graph.node for name in node.output if name}
    inputs = {value.name for value in graph.input} - {w.name for w in graph.initializer}
    outputs = {value.name for value in graph.output}
    moving = made - read.constants
    ends = sum(sizes.get(name, 0) for name in inputs)
    return MemoryEstimate(
        weights=sum(_bytes(w.data_type, tuple(w.dims)) for w in graph.initializer),
        activations=_peak(graph, sizes, moving - outputs),
        inputs_and_outputs=ends + 2 * sum(sizes.get(name, 0) for name in outputs),
        unknown=len(moving - sizes.keys()),
        values=len(moving),
    )


def _with_shapes(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> ModelProto:
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in fixed.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, shapes[value.name], strict=True):
                dim.dim_value = size
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True)


def _sizes(graph: GraphProto) -> dict[str, int]:
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = _bytes(tensor.elem_type, tuple(dim.dim_value for dim in dims))
    return found


def _peak(graph: GraphProto, sizes: Mapping[str, int], counted: set[str]) -> int:
    last_use = {name: at for at, node in enumerate(graph.node) for name in node.input}
    alive = peak = 0
    for at, node in enumerate(graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output if name in counted)
        peak = max(peak, alive)
        ended = {n for n in (*node.input, *node.output) if n in counted}
        alive -= sum(sizes.get(name, 0) for name in ended if last_use.get(name, at) == at)
    return peak


def _bytes(kind: int, shape: tuple[int, ...]) -> int:
    return -(-prod(shape) * BITS.get(kind, 8) // 8)
