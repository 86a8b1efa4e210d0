"""Stable names in a traced graph: weights by parameter, dims by contract, no source paths.

A weight that is transposed where it is used becomes "NAME::T" (`runtime.weight_forms`).
"""

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.part import Part
from fewstep.runtime.weight_forms import TRANSPOSED


def name_weights(model: ir.Model) -> None:
    """Fold the transposes of weights, naming the results, and drop the tracer's name prefixes."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Transpose" and node.inputs[0] in _initializers(graph):
            _fold_transpose(graph, node)
    used = {value for node in graph.all_nodes() for value in node.inputs if value is not None}
    for name, value in list(graph.initializers.items()):
        if value not in used and value not in graph.outputs:
            del graph.initializers[name]


def _initializers(graph: ir.Graph) -> set[ir.Value]:
    return set(graph.initializers.values())


def _fold_transpose(graph: ir.Graph, node: ir.Node) -> None:
    weight, output = node.inputs[0], node.outputs[0]
    assert weight is not None
    assert weight.name is not None
    assert weight.const_value is not None
    attribute = node.attributes.get("perm")
    perm = tuple(attribute.as_ints()) if attribute is not None else None
    if perm not in (None, (1, 0)) or len(weight.const_value.shape) != 2:
        return
    name = f"{weight.name}{TRANSPOSED}"
    folded = graph.initializers.get(name)
    if folded is None:
        folded = _transposed(weight, name)
        graph.register_initializer(folded)
    output.replace_all_uses_with(folded)
    graph.remove(node, safe=True)


def _transposed(weight: ir.Value, name: str) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = (int(size) for size in tensor.shape.numpy())
    lazy = ir.LazyTensor(  # evaluated while the file is written, one weight at a time
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape((columns, rows)),
        name=name,
    )
    return ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(tensor.dtype), const_value=lazy)


def name_dims(model: ir.Model, part: Part) -> None:
    """Put the contract's symbols on inputs and outputs.

    Raises:
        ExportError: A dim that should be free was fixed by the tracer, or the ranks differ.
    """
    for values, ports in ((model.graph.inputs, part.inputs), (model.graph.outputs, part.outputs)):
        if len(values) != len(ports):
            raise ExportError(
                f"{part.name} was traced with {len(values)} tensors where {len(ports)} are wanted"
            )
        for value, port in zip(values, ports, strict=True):
            traced = list(value.shape) if value.shape is not None else []
            if len(traced) != len(port.dims):
                raise ExportError(
                    f"{part.name} has rank {len(traced)} at {port.name}; wanted {len(port.dims)}"
                )
            for dim, wanted in zip(traced, port.dims, strict=True):
                if isinstance(dim, int) and not wanted.isdigit():
                    raise ExportError(
                        f"{part.name} fixes {wanted!r} of {port.name} at {dim}; it cannot be "
                        "exported with a free size"
                    )
            value.name = port.name
            value.shape = ir.Shape([int(d) if d.isdigit() else d for d in port.dims])


def strip_sources(model: ir.Model) -> None:
    """Drop the tracer's notes on every node and value: they hold paths of the exporting machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
