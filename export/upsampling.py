"""Upsampling convolutions at four ninths of their work: exact up to rounding.

Decoders and UNets double a picture by repeating every pixel, then convolve with 3x3. Of the nine
taps of an output pixel several fall on copies of one pixel; adding their weights up beforehand
leaves four taps on the small picture, in four versions for even and odd rows and columns:

    Resize, Conv 3x3        ->      4 x Conv 2x2, Concat, DepthToSpace

Source:
    Shi et al. 2016, arXiv:1609.07009 (a sub-pixel convolution equals one after nearest resizing).
"""

import numpy as np
import onnx_ir as ir

from fewstep.runtime.weight_forms import PHASES, phase_kernel

NEAREST = {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")}
NEAREST |= {("half_pixel", "round_prefer_ceil")}
"""(coordinates, rounding) under which a doubling repeats every pixel twice."""


def split_upsampling(model: ir.Model) -> None:
    """Rewrite every doubling that only a 3x3 convolution reads (in place)."""
    graph = model.graph
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "Conv" and node.inputs[0] else None
        if before is not None and _is_doubling(before) and _is_plain(node, before):
            _rewrite(graph, node, before)


def _is_doubling(node: ir.Node) -> bool:
    if node.op_type != "Resize" or node.domain or len(node.inputs) != 3:
        return False
    scales = node.inputs[2]
    if scales is None or scales.const_value is None or node.attributes.get_ints("axes", ()):
        return False
    mode = node.attributes.get_string("mode", "nearest")
    where = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    is_double = scales.const_value.numpy().tolist() == [1.0, 1.0, 2.0, 2.0]
    return mode == "nearest" and (where, rounding) in NEAREST and is_double


def _is_plain(conv: ir.Node, doubling: ir.Node) -> bool:
    """3x3, same size, not grouped, with weights of its own, and alone in reading the doubling."""
    weight, attributes = conv.inputs[1], conv.attributes
    return (
        weight is not None
        and weight.is_initializer()
        and weight.const_value is not None
        and len(weight.uses()) == 1
        and len(doubling.outputs[0].uses()) == 1
        and tuple(weight.const_value.shape.numpy())[2:] == (3, 3)
        and list(attributes.get_ints("pads", ())) == [1, 1, 1, 1]
        and list(attributes.get_ints("strides", (1, 1))) == [1, 1]
        and list(attributes.get_ints("dilations", (1, 1))) == [1, 1]
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _rewrite(graph: ir.Graph, conv: ir.Node, doubling: ir.Node) -> None:
    small, weight, output = doubling.inputs[0], conv.inputs[1], conv.outputs[0]
    assert weight is not None
    name, scales = conv.name or output.name, doubling.inputs[2]
    made = []
    for ending, (row, column) in PHASES.items():
        kernel = _kernel(weight, ending, row, column)
        graph.register_initializer(kernel)
        # pixels (i - 1, i) for even rows, (i, i + 1) for odd ones: one row of padding on that side
        attributes = {
            "kernel_shape": [2, 2],
            "pads": [1 - row, 1 - column, row, column],
            "strides": [1, 1],
            "dilations": [1, 1],
            "group": 1,
        }
        inputs = [small, kernel, *conv.inputs[2:]]
        made.append(ir.node("Conv", inputs, attributes, name=f"{name}{ending}"))
    phases = [node.outputs[0] for node in made]
    made.append(ir.node("Concat", phases, {"axis": 1}, name=f"{name}_phases"))
    shuffle = {"blocksize": 2, "mode": "DCR"}
    made.append(ir.node("DepthToSpace", made[-1].outputs, shuffle, name=f"{name}_shuffle"))
    for place, node in enumerate(made):
        node.outputs[0].name, node.outputs[0].type = f"{output.name}_up{place}", output.type
    last = made[-1].outputs[0]
    last.name, last.shape = output.name, output.shape
    ir.convenience.replace_nodes_and_values(graph, conv, [conv], made, [output], [last])
    graph.remove(doubling, safe=True)
    for value in (weight, scales):
        if value is not None and value.is_initializer() and not value.uses():
            assert value.name is not None
            del graph.initializers[value.name]


def _kernel(weight: ir.Value, ending: str, row: int, column: int) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    name = f"{weight.name}{ending}"
    out_channels, in_channels = (int(size) for size in tensor.shape.numpy()[:2])
    shape = ir.Shape((out_channels, in_channels, 2, 2))
    lazy = ir.LazyTensor(  # evaluated while the file is written, one weight at a time
        lambda: ir.tensor(phase_kernel(np.asarray(tensor.numpy()), row, column), name=name),
        dtype=tensor.dtype,
        shape=shape,
        name=name,
    )
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
