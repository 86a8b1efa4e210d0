"""nvfp4: four bit floats in blocks of 16 for NVIDIA's Blackwell, weights by nvidia-modelopt.

Every layer takes the form that modelopt gives to torch modules it exports: its input goes through
TRT_FP4DynamicQuantize, which finds a scale per 16 numbers in each call, its weight through
TRT_FP4QDQ, a mark that modelopt's exporter replaces by the rounded weight and its scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError, MissingExtraError
from fewstep.export.quantizing.input_ranges import HALF_MAX, Seen, input_ranges
from fewstep.export.quantizing.layers import Layer, load_graph
from fewstep.export.quantizing.modelopt_scheme import EXTRA
from fewstep.export.quantizing.schemes import Scheme, quiet
from fewstep.runtime.manifest import Precision
from fewstep.runtime.session import Feeds

BLOCK = 16
LARGEST = 6.0 * 448.0
"""Of a four bit float times that of the eight bit float that scales its block."""
DOMAIN = "trt"
OPSET, IR_VERSION = 23, 11
"""First with four bit floats."""
CHANGED = frozenset({"GroupNormalization", "GridSample", "DFT"})
"""Operators that mean something else from opset 20 or 21 on."""


@dataclass(frozen=True, slots=True)
class NvFp4(Scheme):
    """Four bit floats (e2m1), an e4m3 scale per 16, a float32 scale per tensor.

    Raises:
        MissingExtraError: nvidia-modelopt is not installed.
    """

    precision: ClassVar[Precision] = "nvfp4"
    needs_feeds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _exporter()  # said before anything is computed

    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        if not feeds:
            raise ExportError("there are no inputs to calibrate with; give at least one prompt")
        model = load_graph(source)
        ranges = input_ranges(source, layers, feeds)
        chosen = [layer for layer in layers if fits(layer, model, ranges[layer.name])]
        if not chosen:
            raise ExportError(
                f"none of {len(layers)} layers has inputs of 2 or 3 axes whose width is a multiple "
                f"of {BLOCK}, which nvfp4 needs; use another precision"
            )
        check_range({layer.name: ranges[layer.name] for layer in chosen})
        mark(model, chosen, {layer.name: ranges[layer.name].largest for layer in chosen})
        with quiet():
            proto = _exporter().process_model(ir.serde.serialize_model(model))
        made = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(made.graph, source.parent)
        tidy(made)
        ir.save(made, target, external_data=f"{target.name}_data")

    @property
    def notes(self) -> dict[str, Any]:
        return {
            "weights": f"e2m1 in blocks of {BLOCK}, e4m3 scales",
            "activations": "the same, scales taken anew in each call",
            "made_by": "nvidia-modelopt",
        }


def fits(layer: Layer, model: ir.Model, seen: Seen) -> bool:
    """Whether TensorRT and modelopt's exporter take a layer; the others stay float."""
    weight = model.graph.initializers[layer.weight].const_value
    assert weight is not None
    shape = weight.shape.numpy()
    is_whole = len(shape) == 2 and shape[0] % BLOCK == 0 and shape[1] % 2 == 0
    return is_whole and len(layer.nodes) == 1 and set(seen.ranks) <= {2, 3}


def check_range(ranges: dict[str, Seen]) -> None:
    """Products are those of float16 values, as modelopt makes them.

    Raises:
        ExportError: One does not fit into float16.
    """
    for name, seen in ranges.items():
        if not seen.largest < HALF_MAX:
            raise ExportError(
                f"the input of {name} reaches {seen.largest:.4g} and float16 ends at {HALF_MAX:g}; "
                f"leave it float with --skip '{name}'"
            )


def mark(model: ir.Model, layers: Sequence[Layer], largest: dict[str, float]) -> None:
    """Give layers the form that modelopt's exporter expects, in place.

    Args:
        model: Of MatMul nodes with constant weights.
        layers: Those that become nvfp4.
        largest: Name of a layer -> largest magnitude of its input.

    Raises:
        ExportError: An operator of the graph changed its meaning before nvfp4 was there.
    """
    _raise_opset(model)
    nodes = {node.name: node for node in model.graph}
    for layer in layers:
        _mark_one(model.graph, nodes[layer.nodes[0]], layer, largest[layer.name])


def tidy(model: ir.Model) -> None:
    """The exporter makes its constants inputs of the graph; nobody gives them."""
    given = [value for value in model.graph.inputs if value.const_value is None]
    model.graph.inputs.clear()
    model.graph.inputs.extend(given)
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version or 0, IR_VERSION)


def _raise_opset(model: ir.Model) -> None:
    before = model.opset_imports[""]
    found = {node.op_type for node in model.graph.all_nodes()} & CHANGED
    if before < 21 and found:
        raise ExportError(
            f"the graph has {', '.join(sorted(found))} of opset {before}, and nvfp4 needs {OPSET}; "
            f"export with --opset {OPSET}"
        )
    model.opset_imports[""] = max(before, OPSET)


def _mark_one(graph: ir.Graph, node: ir.Node, layer: Layer, largest: float) -> None:
    given, output, name = node.inputs[0], node.outputs[0], layer.name
    scale = _stored(graph, f"{name}_input_scale", np.float32(largest / LARGEST or 1.0))
    quantized = ir.node(
        "TRT_FP4DynamicQuantize",
        [given, scale],
        {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
        domain=DOMAIN,
        num_outputs=2,
        name=f"{name}_quantize",
    )
    four, eight = quantized.outputs
    scales = ir.node("DequantizeLinear", [eight, scale], name=f"{name}_input_scales")
    blocks = {"axis": -1, "block_size": BLOCK}
    rounded = ir.node(
        "DequantizeLinear", [four, scales.outputs[0]], blocks, name=f"{name}_dequantize"
    )
    weight = _weight(graph, node, layer)
    marked = ir.node(
        "TRT_FP4QDQ", [weight], {"block_size": BLOCK}, domain=DOMAIN, name=f"{name}_mark"
    )
    marked.outputs[0].type, marked.outputs[0].shape = weight.type, weight.shape
    turned = ir.node("Transpose", marked.outputs, {"perm": [1, 0]}, name=f"{name}_transpose")
    product = ir.node("MatMul", [rounded.outputs[0], turned.outputs[0]], name=node.name)
    # the exporter makes the product one of float16; what follows is float32
    last = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT}, name=f"{name}_float")
    last.outputs[0].name, last.outputs[0].type = output.name, output.type
    last.outputs[0].shape = output.shape
    output.name = None
    added = [quantized, scales, rounded, marked, turned, product, last]
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, [output], last.outputs)
    _name_values(added, name)


def _name_values(nodes: Sequence[ir.Node], name: str) -> None:
    for place, value in enumerate(value for node in nodes[:-1] for value in node.outputs):
        value.name = f"{name}_nvfp4_{place}"


def _weight(graph: ir.Graph, node: ir.Node, layer: Layer) -> ir.Value:
    """The weight as the torch module has it, in place of its transposed form."""
    held = node.inputs[1]
    assert held is not None
    assert held.const_value is not None
    value = np.ascontiguousarray(held.const_value.numpy().T)
    node.replace_input_with(1, None)
    del graph.initializers[layer.weight]
    return _stored(graph, layer.name, value)


def _stored(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(value), name=name)
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    made = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(made)
    return made


def _exporter() -> Any:
    try:
        from modelopt.onnx.export import (  # pyright: ignore[reportMissingImports]
            NVFP4QuantExporter,
        )
    except ImportError as error:
        raise MissingExtraError("nvidia-modelopt", EXTRA) from error
    return NVFP4QuantExporter
