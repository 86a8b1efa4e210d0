"""What depends on the step alone is computed at export: time embeddings, modulation tables."""

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

LARGEST_INPUT = 1 << 31
"""Bytes: even the largest time embedding's weights may take part in folding."""
LARGEST_OUTPUT = 1 << 22
"""Bytes: what is stored per step stays small beside the weights."""


def fold_constants(model: ir.Model) -> None:
    """Evaluate everything that no input of the graph reaches, in place."""
    optimizer.optimize(
        model,
        onnx_shape_inference=False,
        input_size_limit=LARGEST_INPUT,
        output_size_limit=LARGEST_OUTPUT,
    )


def keep_one_row(graph: ir.Graph) -> None:
    """Keep a constant that is repeated for every picture as one row: what follows broadcasts.

    Networks repeat the timestep before they embed it. Where a row would not do (it is joined with
    rows of a batch), ONNX Runtime refuses the graph, which the gate after fusing sees.
    """
    constant = {value for value in graph.initializers.values()}
    for node in graph:
        if node.op_type == "Constant":
            constant.update(node.outputs)
            continue
        if node.op_type == "Expand" and node.inputs[0] in constant:
            _to_one_row(graph, node)
        if all(value is None or value in constant for value in node.inputs) and node.inputs:
            constant.update(node.outputs)


def drop_notes(graph: ir.Graph) -> None:
    """Leave out types and shapes of inner values, which hosts work out again."""
    kept = set(graph.outputs)
    for node in graph:
        for output in node.outputs:
            if output not in kept:
                output.type = output.shape = None


def _to_one_row(graph: ir.Graph, node: ir.Node) -> None:
    target, output = node.inputs[1], node.outputs[0]
    is_free = target is not None and ir.convenience.get_const_tensor(target) is None
    if not is_free or output.shape is None:
        return
    rank = len(output.shape)
    name = f"one_row_{rank}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(rank, np.int64), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape([rank]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
    node.replace_input_with(1, graph.initializers[name])
