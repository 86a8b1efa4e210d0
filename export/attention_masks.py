"""Masks of the Attention operator, as ONNX Runtime's kernel takes them.

ONNX (opset 23) lets a mask be broadcast over the queries; the CPU kernel of ONNX Runtime (1.32)
refuses one that has a single row for all of them. Torch exports such masks wherever a key is hidden
from every query, as padding of a prompt is.
"""

import numpy as np
import onnx_ir as ir

QUERY, MASK = 0, 3
"""Inputs of Attention."""


def widen_masks(model: ir.Model) -> None:
    """Give each mask a row per query (in place); graphs before opset 23 have none."""
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) <= MASK:
            continue
        query, mask = node.inputs[QUERY], node.inputs[MASK]
        if query is None or mask is None or _has_rows(mask):
            continue
        axis = 2 if query.shape is None or len(query.shape) == 4 else 1
        made = _expanded(query, mask, axis)
        model.graph.insert_before(node, made)
        node.replace_input_with(MASK, made[-1].outputs[0])


def _has_rows(mask: ir.Value) -> bool:
    """Whether it is known to have more than one row."""
    if mask.shape is None or len(mask.shape) < 2:
        return False
    rows = mask.shape[-2]
    return isinstance(rows, int) and rows > 1


def _expanded(query: ir.Value, mask: ir.Value, axis: int) -> list[ir.Node]:
    """Nodes whose last output is the mask, broadcast to (1, 1, queries, 1) and its own shape."""
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.int64))})
    length = ir.node("Shape", [query], {"start": axis, "end": axis + 1})
    ones = one.outputs[0]
    shape = ir.node("Concat", [ones, ones, length.outputs[0], ones], {"axis": 0})
    expand = ir.node("Expand", [mask, shape.outputs[0]])
    if mask.dtype is not None:
        expand.outputs[0].dtype = mask.dtype
    return [one, length, shape, expand]
