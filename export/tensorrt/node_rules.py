"""Rules of single operators: attributes, quantisation, ranks."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from fewstep.export.tensorrt.graph import ReadGraph, attribute, int_attribute, text_attribute
from fewstep.export.tensorrt.operators import QUANTISED

RESIZE_MODES = ("nearest", "linear")
RESIZE_TRANSFORMS = (
    *("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn"),
    *("asymmetric", "align_corners"),
)
NEAREST_MODES = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
MAX_K = 3840
FOUR_BIT_BLOCK = 16


def resize(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Modes TensorRT has, no anti-aliasing, no bfloat16."""
    mode = text_attribute(node, "mode", "nearest")
    transform = text_attribute(node, "coordinate_transformation_mode", "half_pixel")
    nearest = text_attribute(node, "nearest_mode", "round_prefer_floor")
    policy = text_attribute(node, "keep_aspect_ratio_policy", "stretch")
    if mode not in RESIZE_MODES:
        yield f"Resize mode {mode}; TensorRT takes {' and '.join(RESIZE_MODES)}"
    if transform not in RESIZE_TRANSFORMS:
        yield f"Resize with {transform}; TensorRT takes {', '.join(RESIZE_TRANSFORMS)}"
    if mode == "nearest" and nearest not in NEAREST_MODES:
        yield f"Resize with nearest_mode {nearest}; TensorRT takes {', '.join(NEAREST_MODES)}"
    if policy != "stretch":
        yield f"Resize with keep_aspect_ratio_policy {policy}; TensorRT takes stretch"
    if int_attribute(node, "antialias", 0):
        yield "Resize with antialias; TensorRT has none"
    if read.types.get(node.input[0]) == "bfloat16":
        yield "Resize of bfloat16; cast to float32 around it"


def quantize(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Symmetric, and scales known when the engine is built."""
    yield from _constant_scale(node, read)
    kind = read.types.get(node.output[0])
    if kind is not None and kind not in QUANTISED:
        yield f"{node.op_type} to {kind}; TensorRT takes {', '.join(sorted(QUANTISED))}"
    yield from _zero_point(node, read)


def dequantize(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Symmetric, and scales known when the engine is built, but those of blocks of an input."""
    if not _is_of_blocks(node, read):
        yield from _constant_scale(node, read)
    kind = read.types.get(node.input[0])
    if kind is not None and kind not in QUANTISED:
        yield f"{node.op_type} of {kind}; TensorRT takes {', '.join(sorted(QUANTISED))}"
    yield from _zero_point(node, read)


def four_bit_quantize(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Blocks of 16 with scales of eight bits; the scale of the whole is stored."""
    block = int_attribute(node, "block_size", FOUR_BIT_BLOCK)
    if block != FOUR_BIT_BLOCK:
        yield f"{node.op_type} in blocks of {block}; TensorRT takes {FOUR_BIT_BLOCK}"
    if int_attribute(node, "scale_type", TensorProto.FLOAT8E4M3FN) != TensorProto.FLOAT8E4M3FN:
        yield f"{node.op_type} with scales that are not float8 e4m3fn"
    yield from _constant_scale(node, read)


def top_k(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Sorted, and not too many."""
    if int_attribute(node, "sorted", 1) != 1:
        yield "TopK without sorting; TensorRT sorts"
    k = constant_value(read, node.input[1]) if len(node.input) > 1 else None
    if k is not None and int(k.max()) >= MAX_K:
        yield f"TopK of {int(k.max())}; TensorRT takes less than {MAX_K}"


def first_output_only(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """Statistics beside the result are not given."""
    if any(node.output[1:]):
        yield f"{node.op_type} with {len(node.output)} outputs; TensorRT gives the first only"


def convolution(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """One to three spatial axes."""
    shape = next((w.dims for w in read.graph.initializer if w.name == node.input[1]), None)
    if shape is not None and not 3 <= len(shape) <= 5:
        yield f"{node.op_type} with a weight of rank {len(shape)}; TensorRT takes 3 to 5"


def constant(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    """No strings, nothing sparse."""
    for name in ("sparse_value", "value_string", "value_strings"):
        if attribute(node, name) is not None:
            yield f"Constant with {name}; TensorRT takes dense numbers"


def _is_of_blocks(node: NodeProto, read: ReadGraph) -> bool:
    """Whether it brings back what TRT_FP4DynamicQuantize made, with the scales that it found."""
    made = {value: other for other in read.graph.node for value in other.output}
    scales = made.get(node.input[1])
    if scales is None or scales.op_type != "DequantizeLinear":
        return False
    first, second = made.get(node.input[0]), made.get(scales.input[0])
    is_four_bits = first is not None and first.op_type == "TRT_FP4DynamicQuantize"
    return is_four_bits and first is second


def _constant_scale(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    if len(node.input) > 1 and node.input[1] not in read.constants:
        yield f"scale of {node.op_type} is computed; TensorRT wants a constant"


def _zero_point(node: NodeProto, read: ReadGraph) -> Iterable[str]:
    if len(node.input) < 3 or not node.input[2]:
        return
    stored = _stored(read, node.input[2])
    if stored is None:
        yield f"zero point of {node.op_type} is computed; TensorRT wants 0"
        return
    value = constant_value(read, node.input[2])
    if value is not None and np.any(value.astype(np.float32) != 0):
        yield f"zero point of {node.op_type} is not 0; quantise symmetrically"


def constant_value(read: ReadGraph, name: str) -> np.ndarray | None:
    """A stored value; None where it is computed, or lies in a file that is not there."""
    stored = _stored(read, name)
    if stored is None:
        return None
    try:
        return onnx.numpy_helper.to_array(stored, base_dir=str(Path(read.path).parent))
    except (OSError, ValueError, onnx.checker.ValidationError):
        return None  # stored_data reports it


def _stored(read: ReadGraph, name: str) -> TensorProto | None:
    for weight in read.graph.initializer:
        if weight.name == name:
            return weight
    for node in read.graph.node:
        if node.op_type == "Constant" and name in node.output:
            value = attribute(node, "value")
            return value.t if value is not None else None
    return None


NodeRule = Callable[[NodeProto, ReadGraph], Iterable[str]]
NODE_RULES: dict[str, tuple[NodeRule, ...]] = {
    "Constant": (constant,),
    "Conv": (convolution,),
    "ConvTranspose": (convolution,),
    "DequantizeLinear": (dequantize,),
    "LayerNormalization": (first_output_only,),
    "MaxPool": (first_output_only,),
    "QuantizeLinear": (quantize,),
    "Resize": (resize,),
    "TRT_FP4DynamicQuantize": (four_bit_quantize,),
    "TopK": (top_k,),
}
"""Operator -> functions that give one text per thing that is wrong."""
