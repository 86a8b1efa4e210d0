"""nvfp4: the form of the graph, and a twin that says the same numbers in float."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fewstep.errors import ExportError
from fewstep.export.checking.findings import Findings
from fewstep.export.checking.speed import Times
from fewstep.export.quantizing.command import QuantizeOptions, run
from fewstep.export.quantizing.input_ranges import Seen, input_ranges
from fewstep.export.quantizing.layers import Layer, layers_of, load_graph, split_linear
from fewstep.export.quantizing.nvfp4_scheme import BLOCK, check_range, fits, mark
from fewstep.export.quantizing.nvfp4_twin import (
    NOTE,
    stored_weight,
    to_twin,
    unverified,
    without_times,
)
from fewstep.runtime.manifest import Measured
from tests.export.quantizing.folders import feeds, source

EIGHT, FOUR = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
HALFWAY = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -2.5, -3.5, -5.0, 6, -6)
"""A block whose scale is 1, and most of whose numbers lie between two of four bits."""


def rounded(value: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four bit numbers and the eight bit scales of their blocks, by ml_dtypes' casts."""
    blocks = value.reshape(*value.shape[:-1], -1, BLOCK)
    wanted = np.abs(blocks).max(-1) / (np.float32(6) * scale)
    eight = wanted.clip(2.0**-9, 448).astype(EIGHT)
    four = blocks / (eight.astype(np.float32) * scale)[..., None]
    return four.clip(-6, 6).reshape(value.shape).astype(FOUR), eight


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801 - onnx finds an operator by its class's name
    """TensorRT's operator, for onnx's own evaluator."""

    op_domain = "trt"

    def _run(self, x: np.ndarray, scale: np.ndarray, **attributes: Any) -> Any:
        assert attributes == {
            "axis": -1,
            "block_size": BLOCK,
            "scale_type": TensorProto.FLOAT8E4M3FN,
        }
        return rounded(x, scale)


def one_layer(weight: np.ndarray) -> onnx.ModelProto:
    """One linear layer in nvfp4, written by hand; weight has shape (out, in)."""
    height, width = weight.shape
    scale = np.abs(weight).max() / np.float32(2688)
    four, eight = rounded(weight, scale)
    kept = [
        helper.make_tensor("w4", TensorProto.FLOAT4E2M1, four.shape, packed(four), raw=True),
        helper.make_tensor("w8", TensorProto.FLOAT8E4M3FN, eight.shape, eight.tobytes(), raw=True),
        helper.make_tensor("w32", TensorProto.FLOAT, [1], [scale]),
        helper.make_tensor("s", TensorProto.FLOAT, [], [1.0]),
    ]
    blocks: dict[str, Any] = {"axis": -1, "block_size": BLOCK}
    kind: dict[str, Any] = {"scale_type": TensorProto.FLOAT8E4M3FN}
    quantize = "TRT_FP4DynamicQuantize"
    nodes = [
        helper.make_node(quantize, ["x", "s"], ["x4", "x8"], domain="trt", **blocks, **kind),
        helper.make_node("DequantizeLinear", ["x8", "s"], ["xs"]),
        helper.make_node("DequantizeLinear", ["x4", "xs"], ["xf"], **blocks),
        helper.make_node("DequantizeLinear", ["w8", "w32"], ["ws"]),
        helper.make_node("DequantizeLinear", ["w4", "ws"], ["wf"], **blocks),
        helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xf", "wt"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "N", width])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "N", height])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    graph = helper.make_graph(nodes, "layer", [given], [made], kept)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def packed(four: np.ndarray) -> bytes:
    codes = four.view(np.uint8).ravel()
    return (codes[::2] | (codes[1::2] << 4)).tobytes()


def answers(model: onnx.ModelProto, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a graph as onnx evaluates it, and of its twin in ONNX Runtime."""
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize])
    wanted: Any = evaluator.run(None, {"x": value})
    twin = ir.serde.serialize_model(to_twin(ir.serde.deserialize_model(model)))
    found = ort.InferenceSession(twin.SerializeToString()).run(None, {"x": value})
    return np.asarray(wanted[0]), np.asarray(found[0])


def test_a_twin_gives_what_onnx_evaluates() -> None:
    generator = np.random.default_rng(0)
    model = one_layer(generator.normal(size=(32, 64)).astype(np.float32))
    onnx.checker.check_model(model, full_check=True)
    value = generator.normal(size=(2, 5, 64)).astype(np.float32) * 3
    value[0, 0, :BLOCK] = 0  # a block without a number has a scale all the same
    value[0, 1, :BLOCK] = 1e-6
    value[1, 2, :BLOCK] = 1e5  # beyond what four bits and a scale of eight can say
    wanted, found = answers(model, value)
    assert np.abs(wanted - found).max() < 1e-5 * np.abs(wanted).max()


def test_halfway_numbers_round_to_even() -> None:
    model = one_layer(np.eye(BLOCK, dtype=np.float32) * 6)
    value = np.array(HALFWAY, np.float32).reshape(1, 1, BLOCK)
    wanted, found = answers(model, value)
    plain = [0, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -4, -4, 6, -6]
    assert np.allclose(found.ravel() / 6, plain, rtol=1e-6)
    assert np.allclose(wanted, found, rtol=1e-6)


def test_a_stored_weight_is_a_product_of_three() -> None:
    weight = np.random.default_rng(1).normal(size=(8, 48)).astype(np.float32)
    scale = np.abs(weight).max() / np.float32(2688)
    four, eight = rounded(weight, scale)
    found = stored_weight(four, eight, np.array([scale]))
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert 0.06 < error < 0.12  # of a normal distribution in e2m1 with a scale per 16
    largest = np.abs(weight).reshape(8, 3, BLOCK).max(-1)
    kept = np.abs(found).reshape(8, 3, BLOCK).max(-1)
    assert np.abs(kept / largest - 1).max() < 2**-4 + 1e-6  # the block's largest, by e4m3's step


def layers_and_model(tmp_path: Path) -> tuple[ir.Model, tuple[Layer, ...], Path]:
    model = load_graph(source().root / source().manifest.graphs["transformer"].file)
    split_linear(model)
    file = tmp_path / "source.onnx"
    ir.save(model, file, external_data="source.onnx_data")
    return load_graph(file), layers_of(model), file


def test_ranges_are_those_of_the_inputs(tmp_path: Path) -> None:
    _, layers, file = layers_and_model(tmp_path)
    seen = input_ranges(file, layers, feeds()[:3])
    texts = [np.abs(given["encoder_hidden_states"]).max() for given in feeds()[:3]]
    assert seen["model.context_embedder.weight"] == Seen(float(max(texts)), (3,))
    assert set(seen) == {layer.name for layer in layers}
    assert seen["model.norm_out.linear.weight"].ranks == (2,)


def test_marked_layers_have_the_exporters_form(tmp_path: Path) -> None:
    model, layers, _ = layers_and_model(tmp_path)
    before = {layer.name: model.graph.initializers[layer.weight].const_value for layer in layers}
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    mark(model, layers, {layer.name: 2688.0 for layer in layers})
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == names
    assert model.opset_imports[""] == 23
    kinds = [node.op_type for node in model.graph]
    for kind, times in (("TRT_FP4QDQ", 1), ("TRT_FP4DynamicQuantize", 1), ("DequantizeLinear", 2)):
        assert kinds.count(kind) == times * len(layers)
    values = [value.name for node in model.graph for value in node.outputs]
    assert len(set(values)) == len(values)
    for layer in layers:
        weight, scale = (
            model.graph.initializers[name].const_value
            for name in (layer.name, f"{layer.name}_input_scale")
        )
        known = before[layer.name]
        assert weight is not None
        assert scale is not None
        assert known is not None
        assert np.array_equal(weight.numpy(), known.numpy().T)
        assert scale.numpy() == np.float32(1.0)


def test_layers_that_do_not_fit_stay_float() -> None:
    def layer(shape: tuple[int, int], nodes: tuple[str, ...] = ("n",)) -> tuple[Layer, ir.Model]:
        held = ir.Value(name="w", const_value=ir.tensor(np.zeros(shape, np.float32), name="w"))
        graph = ir.Graph([], [], nodes=[], initializers=[held], opset_imports={"": 18})
        return Layer("w", "w", nodes, "MatMul", 0), ir.Model(graph, ir_version=10)

    assert fits(*layer((32, 8)), Seen(1.0, (2, 3)))
    assert not fits(*layer((40, 8)), Seen(1.0, (2,)))
    assert not fits(*layer((32, 7)), Seen(1.0, (2,)))
    assert not fits(*layer((32, 8)), Seen(1.0, (4,)))
    assert not fits(*layer((32, 8), ("n", "m")), Seen(1.0, (2,)))


def test_what_cannot_be_written_is_said() -> None:
    check_range({"a": Seen(65503.0, (2,))})
    for largest in (7e4, float("nan")):
        with pytest.raises(ExportError, match=r"input of blocks.0 reaches .* --skip 'blocks.0'"):
            check_range({"blocks.0": Seen(largest, (2,))})
    node = ir.node("GroupNormalization", [], num_outputs=1)
    graph = ir.Graph([], [], nodes=[node], opset_imports={"": 18})
    with pytest.raises(ExportError, match="GroupNormalization of opset 18.*--opset 23"):
        mark(ir.Model(graph, ir_version=10), (), {})


def test_a_twin_says_nothing_of_speed() -> None:
    times = Times("transformer", "one", 1.0, 3.0, ratio=3.0, low=3.0, high=3.0, repeats=9)
    kept = Measured(what="image", where="one", value=30.0, unit="dB", limit=24.0)
    measured = (kept, *times.measured(1.05))
    found = without_times(Findings("this folder", None, measured=measured, times=(times,)))
    assert found.measured == (kept,)
    assert found.is_good
    assert found.times == ()
    assert found.notes == (NOTE,)


def test_only_what_ran_is_verified() -> None:
    from dataclasses import replace

    plain = replace(source().manifest, verified=True)
    graphs = {n: replace(g, precision="nvfp4") for n, g in plain.graphs.items()}
    assert unverified(plain).verified
    assert not unverified(replace(plain, graphs=graphs)).verified


def test_sensitivity_of_nvfp4_is_refused(tmp_path: Path) -> None:
    from rich.console import Console

    options = QuantizeOptions(
        folder=source().root, out=tmp_path / "out", precision="nvfp4", skip=("auto:3",)
    )
    with pytest.raises(ExportError, match="--skip got 'auto:3'.*regular expressions"):
        run(options, Console())
