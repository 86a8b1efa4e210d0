"""What TensorRT would refuse is found, with the node's name, and nothing else is."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from fewstep.errors import ExportError
from fewstep.export.tensorrt.legality import Report, check_graph
from fewstep.export.tensorrt.operators import DYNAMIC, OPERATORS, release_for_opset
from tests.export.tensorrt.small_graphs import make_model, transformer

NEWEST = (11, 4)
X = ("batch_size", 4)


def check(tmp_path: Path, model: ModelProto, *, tensorrt: tuple[int, int] = NEWEST) -> Report:
    onnx.save(model, tmp_path / "model.onnx")
    return check_graph(tmp_path / "model.onnx", tensorrt=tensorrt)


def messages(report: Report, rule: str) -> list[str]:
    return [f"{f.node}: {f.message}" for f in report.findings if f.rule == rule]


def node(kind: str, inputs: list[str], *, domain: str = "", **attributes: Any):
    return helper.make_node(kind, inputs, ["y"], name=f"/{kind}", domain=domain, **attributes)


def test_a_plain_denoiser_is_legal(tmp_path: Path) -> None:
    report = check(tmp_path, transformer())
    assert report.is_legal
    assert report.operators == {"Transpose": 2, "MatMul": 1, "Add": 2}
    report.require()


def test_names_are_those_of_onnx() -> None:
    assert {name for name in OPERATORS if not onnx.defs.has(name)} <= {"Scatter", "Upsample"}
    assert OPERATORS.keys().isdisjoint(DYNAMIC)


@pytest.mark.parametrize(
    ("opset", "tensorrt", "wanted"),
    [
        (8, NEWEST, "opset 8; TensorRT takes 9 to 25"),
        (26, NEWEST, "opset 26; TensorRT takes 9 to 25"),
        (25, NEWEST, "opset 25 needs TensorRT 11.5, not 11.4"),
        (23, (10, 12), "opset 23 needs TensorRT 10.14, not 10.12"),
        (23, (10, 14), None),
        (18, (10, 12), None),
    ],
)
def test_opsets(tmp_path: Path, opset: int, tensorrt: tuple[int, int], wanted: str | None) -> None:
    report = check(tmp_path, make_model([node("Relu", ["x"])], opset=opset), tensorrt=tensorrt)
    assert messages(report, "opset") == ([f"graph: {wanted}"] if wanted else [])
    assert (release_for_opset(opset) is None) == (opset in (8, 26))


def test_operators_of_a_vendor_are_named(tmp_path: Path) -> None:
    model = make_model(
        [node("FastGelu", ["x"], domain="com.microsoft")], domains=("com.microsoft",)
    )
    (text,) = messages(check(tmp_path, model), "domain")
    assert text == "/FastGelu: com.microsoft.FastGelu is not an ONNX operator"


def test_sizes_that_depend_on_values_are_refused(tmp_path: Path) -> None:
    ends = {"y": (TensorProto.INT64, [2, "count"])}
    (text,) = messages(
        check(tmp_path, make_model([node("NonZero", ["x"])], outputs=ends)), "operator"
    )
    assert text == "/NonZero: NonZero makes sizes depend on values; export without it"


def test_operators_that_came_later(tmp_path: Path) -> None:
    model = make_model(
        [node("RMSNormalization", ["x", "scale"])],
        weights={"scale": np.ones(4, np.float32)},
        opset=23,
    )
    assert check(tmp_path, model, tensorrt=(10, 15)).is_legal
    (text,) = messages(check(tmp_path, model, tensorrt=(10, 14)), "release")
    assert text == "/RMSNormalization: RMSNormalization needs TensorRT 10.15, not 10.14"


def test_an_operator_it_does_not_have(tmp_path: Path) -> None:
    ends = {"y": (TensorProto.FLOAT, [])}
    square = {"x": (TensorProto.FLOAT, [4, 4])}
    model = make_model([node("Det", ["x"])], inputs=square, outputs=ends)
    with pytest.raises(ExportError, match="would refuse .*: /Det: TensorRT has no Det"):
        check(tmp_path, model).require()


def test_types_outside_the_column(tmp_path: Path) -> None:
    whole = (TensorProto.INT64, list(X))
    model = make_model([node("Clip", ["x"])], inputs={"x": whole}, outputs={"y": whole})
    (text,) = messages(check(tmp_path, model), "type")
    assert text == "/Clip: Clip of int64; TensorRT takes bfloat16, float16, float32"


def test_what_is_constant_may_have_any_type(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Clip", ["sizes"], ["clipped"]),
        helper.make_node("Reshape", ["x", "clipped"], ["y"]),
    ]
    model = make_model(nodes, weights={"sizes": np.array([-1, 4])})
    assert check(tmp_path, model).is_legal


def test_double_and_string(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.FLOAT),
    ]
    (text,) = messages(check(tmp_path, make_model(nodes)), "flow")
    assert text.startswith("wide: double; TensorRT has no such type")
    words = make_model(
        [node("Identity", ["x"])],
        inputs={"x": (TensorProto.STRING, [1])},
        outputs={"y": (TensorProto.STRING, [1])},
    )
    assert messages(check(tmp_path, words), "flow")[0].startswith("x: string")


def test_mixed_types_need_a_cast(tmp_path: Path) -> None:
    model = make_model([node("Add", ["x", "half"])], weights={"half": np.ones(4, np.float16)})
    found = messages(check(tmp_path, model), "flow")
    assert "/Add: Add of float16 and float32; put a Cast before it" in found


def test_ranks_that_do_not_fit(tmp_path: Path) -> None:
    model = make_model([node("MatMul", ["x", "w"])], weights={"w": np.ones((5, 3), np.float32)})
    (text,) = messages(check(tmp_path, model), "flow")
    assert text.startswith("graph: types do not fit")


def test_axes_must_be_known(tmp_path: Path) -> None:
    free = {"x": (TensorProto.FLOAT, list(X)), "axes": (TensorProto.INT64, [1])}
    ends = {"y": (TensorProto.FLOAT, ["batch_size", 1])}
    model = make_model([node("ReduceMean", ["x", "axes"])], inputs=free, outputs=ends)
    (text,) = messages(check(tmp_path, model), "constant")
    assert text == "/ReduceMean: input 1 of ReduceMean must be a constant"


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({"mode": "nearest"}, None),
        ({"mode": "linear"}, None),
        ({"mode": "cubic"}, "Resize mode cubic; TensorRT takes nearest and linear"),
        ({"mode": "linear", "antialias": 1}, "Resize with antialias; TensorRT has none"),
        (
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
            "Resize with tf_crop_and_resize; TensorRT takes half_pixel",
        ),
        (
            {"keep_aspect_ratio_policy": "not_larger"},
            "Resize with keep_aspect_ratio_policy not_larger; TensorRT takes stretch",
        ),
    ],
)
def test_resize(tmp_path: Path, attributes: dict[str, Any], wanted: str | None) -> None:
    (text,) = messages(check(tmp_path, resize(TensorProto.FLOAT, **attributes)), "attribute") or (
        None,
    )
    assert (text is None) == (wanted is None)
    assert text is None or text.startswith(f"/Resize: {wanted}")


def test_resize_of_bfloat16(tmp_path: Path) -> None:
    (text,) = messages(check(tmp_path, resize(TensorProto.BFLOAT16)), "attribute")
    assert text == "/Resize: Resize of bfloat16; cast to float32 around it"


def resize(kind: int, **attributes: Any) -> ModelProto:
    shape: list[int | str] = ["batch_size", 4, 8, 8]
    larger: list[int | str] = ["batch_size", 4, 16, 16]
    return make_model(
        [node("Resize", ["x", "", "scales"], **attributes)],
        weights={"scales": np.array([1, 1, 2, 2], np.float32)},
        inputs={"x": (kind, shape)},
        outputs={"y": (kind, larger)},
        opset=19,
    )


def quantised(zero: np.ndarray, scale: np.ndarray | None = None) -> ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="/q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="/dq"),
    ]
    weights = {"scale": np.array(0.1, np.float32) if scale is None else scale, "zero": zero}
    return make_model(nodes, weights=weights)


def test_symmetric_int8_is_legal(tmp_path: Path) -> None:
    assert check(tmp_path, quantised(np.array(0, np.int8))).is_legal


def test_zero_points_must_be_zero(tmp_path: Path) -> None:
    found = messages(check(tmp_path, quantised(np.array(3, np.int8))), "attribute")
    assert found == [
        "/q: zero point of QuantizeLinear is not 0; quantise symmetrically",
        "/dq: zero point of DequantizeLinear is not 0; quantise symmetrically",
    ]


def test_unsigned_activations_are_refused(tmp_path: Path) -> None:
    found = messages(check(tmp_path, quantised(np.array(0, np.uint8))), "attribute")
    kinds = "float4e2m1, float8_e4m3fn, int4, int8"
    assert f"/q: QuantizeLinear to uint8; TensorRT takes {kinds}" in found


def test_scales_must_be_known(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["peak"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "peak", "zero"], ["q"], name="/q"),
        helper.make_node("DequantizeLinear", ["q", "peak", "zero"], ["y"], name="/dq"),
    ]
    model = make_model(nodes, weights={"zero": np.array(0, np.int8)})
    found = messages(check(tmp_path, model), "attribute")
    assert found[0] == "/q: scale of QuantizeLinear is computed; TensorRT wants a constant"


def four_bits(block: int = 16) -> ModelProto:
    quantize = helper.make_node(
        "TRT_FP4DynamicQuantize", ["x", "s"], ["x4", "x8"], "/q", domain="trt", block_size=block
    )
    back = helper.make_node("DequantizeLinear", ["x8", "s"], ["xs"], "/scales")
    last = helper.make_node("DequantizeLinear", ["x4", "xs"], ["y"], "/dq", axis=-1, block_size=16)
    return make_model(
        [quantize, back, last],
        weights={"s": np.array(0.1, np.float32)},
        opset=23,
        domains=("trt",),
    )


def test_inputs_in_four_bits_are_legal(tmp_path: Path) -> None:
    assert check(tmp_path, four_bits()).is_legal
    (text,) = messages(check(tmp_path, four_bits(block=32)), "attribute")
    assert text == "/q: TRT_FP4DynamicQuantize in blocks of 32; TensorRT takes 16"
    (early,) = messages(check(tmp_path, four_bits(), tensorrt=(10, 7)), "release")
    assert early == "/q: TRT_FP4DynamicQuantize needs TensorRT 10.8, not 10.7"


def test_an_operator_the_vendor_does_not_have(tmp_path: Path) -> None:
    model = make_model([node("TRT_FP2", ["x"], domain="trt")], domains=("trt",))
    report = check(tmp_path, model)
    assert messages(report, "domain") == ["/TRT_FP2: trt.TRT_FP2 is not an ONNX operator"]


def test_integers_beyond_int32(tmp_path: Path) -> None:
    far = np.array([2**40, 4])
    model = make_model([node("Reshape", ["x", "sizes"])], weights={"sizes": far})
    (text,) = messages(check(tmp_path, model), "data")
    assert text == f"sizes: holds 4 to {2**40}, beyond int32, and is used by Reshape"
    end = {"starts": np.array([0]), "ends": np.array([2**63 - 1]), "axes": np.array([1])}
    sliced = make_model([node("Slice", ["x", "starts", "ends", "axes"])], weights=end)
    assert check(tmp_path, sliced).is_legal  # "to the end"


def test_external_data(tmp_path: Path) -> None:
    model = transformer()
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight)
    set_external_data(weight, "model.onnx_data", 0, values.nbytes)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    found = messages(check(tmp_path, model), "data")
    assert found[0].startswith("mix.weight::T: ")
    assert found[0].endswith("is missing; copy it beside the graph, or export again")
    (tmp_path / "model.onnx_data").write_bytes(values.tobytes()[:-1])
    (text,) = messages(check(tmp_path, model), "data")
    assert "ends at 63 bytes and its data at 64" in text
    (tmp_path / "model.onnx_data").write_bytes(values.tobytes())
    assert check(tmp_path, model).is_legal
    weight.external_data[0].value = "../elsewhere"
    (text,) = messages(check(tmp_path, model), "data")
    assert "it must lie beside the graph" in text


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is missing; export the folder again"):
        check_graph(tmp_path / "model.onnx", tensorrt=NEWEST)
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff\xff not protobuf")
    with pytest.raises(ExportError, match="is not an ONNX file"):
        check_graph(tmp_path / "model.onnx", tensorrt=NEWEST)
