"""A graph in nvfp4 said in operators that ONNX Runtime has: the same numbers, no fewer bits.

ONNX Runtime's processor kernels know no four bit floats, so that the pictures of an nvfp4 folder
are drawn by its twin. Weights are those that are stored, multiplied out; inputs of layers are
rounded block by block as TRT_FP4DynamicQuantize is defined. Products stay products of float16
values. How fast the real graph is, a twin cannot tell.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep.export.checking.findings import Findings
from fewstep.export.checking.gate import examine
from fewstep.export.checking.inspecting import Progress
from fewstep.export.checking.reference import Reference
from fewstep.export.onnx_folder import write_manifest
from fewstep.export.quantizing.layers import load_graph
from fewstep.export.quantizing.nvfp4_scheme import BLOCK, DOMAIN
from fewstep.export.writing import save_graph
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Manifest

NOTE = "nvfp4 was drawn by a twin in float; no engine was built and no time was measured"
TIMES = ("ratio of time", "ms")
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-9, 448.0
"""What a positive number of float8 e4m3 can be."""
TOP = 6.0
"""Largest of float4 e2m1, whose steps are 0.5 below 2, 1 below 4, and 2."""


@contextmanager
def twin_folder(folder: ExportFolder) -> Iterator[ExportFolder]:
    """A folder beside an nvfp4 one that draws its pictures, while it is needed.

    Args:
        folder: Written, its manifest too.
    """
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=folder.root.parent) as made:
        root = Path(made)
        changed = {n: g for n, g in folder.manifest.graphs.items() if g.precision == "nvfp4"}
        for name in folder.manifest.files:
            if Path(name).parts[0] not in changed:
                _link(folder.root / name, root / name)
        for name, graph in changed.items():
            save_graph(to_twin(load_graph(folder.root / graph.file)), root / name)
        write_manifest(root, folder.manifest)
        yield ExportFolder.open(root)


def examine_twin(
    folder: ExportFolder,
    reference: Reference,
    prompts: tuple[str, ...],
    *,
    threads: int = 0,
    progress: Progress = lambda what: None,
) -> Findings:
    """The gate, as `examine` holds it, for a folder that only its twin can draw.

    Args:
        folder: An nvfp4 folder.
        reference: The float folder it was made from.
        prompts: Of the pictures that are compared.
        threads: Of one network call; 0 takes ONNX Runtime's choice.
        progress: Told what is being done.
    """
    with twin_folder(folder) as twin:
        found = examine(twin, reference, prompts, threads=threads, progress=progress)
    return without_times(found)


def unverified(manifest: Manifest) -> Manifest:
    """A manifest with a twin's figures: the folder's own graphs were never run."""
    has_twin = any(graph.precision == "nvfp4" for graph in manifest.graphs.values())
    return dataclasses.replace(manifest, verified=manifest.verified and not has_twin)


def without_times(found: Findings) -> Findings:
    """What a twin says of the folder: its pictures, not its speed."""
    measured = tuple(one for one in found.measured if one.unit not in TIMES)
    return dataclasses.replace(found, measured=measured, times=(), notes=(*found.notes, NOTE))


def to_twin(model: ir.Model) -> ir.Model:
    """Say an nvfp4 graph in float, in place.

    Args:
        model: As `NvFp4` writes it.

    Returns:
        The same model.
    """
    for node in list(model.graph):
        if node.op_type == "TRT_FP4DynamicQuantize" and node.domain == DOMAIN:
            _round_input(model.graph, node)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and _is_four_bits(node.inputs[0]):
            _multiply_out(model.graph, node)
    model.opset_imports.pop(DOMAIN, None)
    _drop_unused(model.graph)
    return model


def stored_weight(four: np.ndarray, eight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What a layer multiplies by.

    Args:
        four: Shape (out, in), float4 e2m1.
        eight: Shape (out, in / 16), float8 e4m3.
        scale: One float32.
    """
    scales = eight.astype(np.float32) * scale.reshape(())
    return four.astype(np.float32) * scales.repeat(BLOCK, axis=-1)


def _multiply_out(graph: ir.Graph, node: ir.Node) -> None:
    scales = node.inputs[1]
    assert scales is not None
    first = scales.producer()
    assert first is not None
    value = stored_weight(_value(node.inputs[0]), *(_value(given) for given in first.inputs))
    output = node.outputs[0]
    made = _stored(graph, f"{output.name}_float", value)
    output.replace_all_uses_with(made)
    graph.remove([node, first], safe=True)


def _round_input(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a node and the two that bring its outputs back to float."""
    given, scale = node.inputs[0], node.inputs[1]
    assert given is not None
    assert scale is not None
    eight = next(iter(node.outputs[1].uses())).node
    four = next(iter(node.outputs[0].uses())).node
    output = four.outputs[0]
    nodes, rounded = _rounding(graph, given, scale, str(output.name))
    graph.insert_before(node, nodes)
    output.replace_all_uses_with(rounded)
    graph.remove([four, eight, node], safe=True)


def _rounding(
    graph: ir.Graph, given: ir.Value, scale: ir.Value, prefix: str
) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that round a value in blocks along its last axis."""
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{prefix}_{len(nodes)}")
        node.outputs[0].name = f"{prefix}_{len(nodes)}_out"
        nodes.append(node)
        return node.outputs[0]

    def number(value: Any) -> ir.Value:
        key = f"nvfp4_{np.asarray(value).dtype}_{np.asarray(value).ravel().tolist()}"
        return graph.initializers.get(key) or _stored(graph, key, np.asarray(value))

    value = add("Cast", given, to=ir.DataType.FLOAT)
    blocks = add("Reshape", value, number(np.array([-1, BLOCK], np.int64)))
    scales = _scales(add, number, blocks, scale)
    rounded = add("Mul", _to_four_bits(add, number, add("Div", blocks, scales)), scales)
    return nodes, add("Reshape", rounded, add("Shape", value))


def _scales(
    add: Callable[..., ir.Value],
    number: Callable[[Any], ir.Value],
    blocks: ir.Value,
    scale: ir.Value,
) -> ir.Value:
    axes = number(np.array([1], np.int64))
    largest = add("ReduceMax", add("Abs", blocks), axes, keepdims=1)
    wanted = add("Div", largest, add("Mul", scale, number(np.float32(TOP))))
    low, high = number(np.float32(SMALLEST_SCALE)), number(np.float32(LARGEST_SCALE))
    eight = add("Cast", add("Clip", wanted, low, high), to=ir.DataType.FLOAT8E4M3FN)
    return add("Mul", add("Cast", eight, to=ir.DataType.FLOAT), scale)


def _to_four_bits(
    add: Callable[..., ir.Value], number: Callable[[Any], ir.Value], value: ir.Value
) -> ir.Value:
    """The nearest e2m1 number; halfway the one with an even last bit, as Round does it."""
    one, two, four = (number(np.float32(n)) for n in (1.0, 2.0, 4.0))
    size = add("Abs", value)
    above = add("Where", add("Less", size, four), one, two)
    step = add("Where", add("Less", size, two), number(np.float32(0.5)), above)
    rounded = add("Mul", add("Round", add("Div", size, step)), step)
    return add("Mul", add("Sign", value), add("Min", rounded, number(np.float32(TOP))))


def _is_four_bits(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT4E2M1 and value.is_initializer()


def _value(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _stored(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    made = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(made)
    return made


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
