"""A doubling and its 3x3 convolution as four small ones: the same numbers from fewer products."""

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from fewstep.errors import ExportError, RuntimeSettingError
from fewstep.export.quantizing.layers import layers_of, replace_weights
from fewstep.export.upsampling import split_upsampling
from fewstep.runtime.tensorrt.engine import stored_weights
from fewstep.runtime.weight_forms import (
    PHASES,
    is_phase,
    parameter_of,
    phase_kernel,
    stored_names,
    stored_value,
)
from tests.export.tiny_exports import exported

IN, OUT = 3, 5
DIMS = ["b", None, None, None]
WAYS = [
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A doubling and a convolution, or what is not quite one."""

    way: tuple[str, str] = ("asymmetric", "floor")
    mode: str = "nearest"
    scale: float = 2.0
    kernel: int = 3
    stride: int = 1
    group: int = 1
    pad: int = 1
    is_read_twice: bool = False
    has_bias: bool = True


def graph_of(spec: Spec, dtype: Any = np.float32) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = rng.normal(size=(OUT if spec.group == 1 else IN, IN // spec.group, *[spec.kernel] * 2))
    initial = {"scales": np.array([1, 1, spec.scale, spec.scale], np.float32)}
    initial |= {"conv.weight": weight.astype(dtype)}
    if spec.has_bias:
        initial["conv.bias"] = rng.normal(size=len(weight)).astype(dtype)
    where, rounding = spec.way
    resize = {"mode": spec.mode, "coordinate_transformation_mode": where, "nearest_mode": rounding}
    conv = {"kernel_shape": [spec.kernel] * 2, "pads": [spec.pad] * 4, "group": spec.group}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["big"], "resize", **resize),
        helper.make_node(
            "Conv",
            ["big", "conv.weight", *(["conv.bias"] if spec.has_bias else [])],
            ["y"],
            "conv",
            strides=[spec.stride] * 2,
            **conv,
        ),
    ]
    outputs = [helper.make_tensor_value_info("y", kind, DIMS)]
    if spec.is_read_twice:
        nodes.append(helper.make_node("Relu", ["big"], ["z"], "relu"))
        outputs.append(helper.make_tensor_value_info("z", kind, DIMS))
    given = [helper.make_tensor_value_info("x", kind, ["b", IN, "h", "w"])]
    tensors = [numpy_helper.from_array(value, name) for name, value in initial.items()]
    graph = helper.make_graph(nodes, "g", given, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    loaded = ir.from_proto(model)
    split_upsampling(loaded)
    proto = ir.to_proto(loaded)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: onnx.ModelProto, x: np.ndarray) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def picture(height: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, IN, height, width)).astype(dtype)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_four_convolutions_of_the_small_picture_are_the_one_of_the_large(
    way: tuple[str, str], size: tuple[int, int], has_bias: bool
) -> None:
    plain = graph_of(Spec(way=way, has_bias=has_bias))
    made = rewritten(plain)
    assert operators(made) == ["Conv"] * 4 + ["Concat", "DepthToSpace"]
    assert {t.name for t in made.graph.initializer} - {"conv.bias"} == {
        f"conv.weight{ending}" for ending in PHASES
    }
    x = picture(*size)
    np.testing.assert_allclose(run(made, x)[0], run(plain, x)[0], rtol=1e-5, atol=1e-5)


def test_it_is_what_torch_does() -> None:
    plain = graph_of(Spec())
    values = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in plain.graph.initializer}
    x = torch.from_numpy(picture(5, 6))
    big = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    wanted = functional.conv2d(big, values["conv.weight"], values["conv.bias"], padding=1)
    np.testing.assert_allclose(run(rewritten(plain), x.numpy())[0], wanted, rtol=1e-5, atol=1e-5)


def test_in_half_precision_the_type_stays() -> None:
    plain = graph_of(Spec(), np.float16)
    made = rewritten(plain)
    assert {t.data_type for t in made.graph.initializer} == {TensorProto.FLOAT16}
    x = picture(4, 5, np.float16)
    np.testing.assert_allclose(run(made, x)[0], run(plain, x)[0], rtol=0.02, atol=0.03)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(mode="linear"),
        Spec(scale=3.0),
        Spec(way=("align_corners", "floor")),
        Spec(way=("half_pixel", "floor")),
        Spec(kernel=1, pad=0),
        Spec(kernel=5, pad=2),
        Spec(stride=2),
        Spec(pad=0),
        Spec(group=IN),
        Spec(is_read_twice=True),
    ],
    ids=str,
)
def test_what_is_not_the_same_is_left_alone(spec: Spec) -> None:
    plain = graph_of(spec)
    assert operators(rewritten(plain)) == operators(plain)


def test_a_weight_that_others_read_is_left_alone() -> None:
    plain = graph_of(Spec())
    plain.graph.node.append(helper.make_node("Conv", ["x", "conv.weight"], ["other"], "other"))
    plain.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, DIMS))
    assert "Resize" in operators(rewritten(plain))


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_exported_graphs_enlarge_no_picture_before_a_convolution(component: str) -> None:
    model = onnx.load(exported("sd15") / component / "model.onnx", load_external_data=False)
    assert "Resize" not in operators(model)
    phases = [t.name for t in model.graph.initializer if is_phase(t.name)]
    assert len(phases) >= 4
    assert {len(stored_names(parameter_of(name), phases)) for name in phases} == {4}
    assert all(parameter_of(name).endswith("upsamplers.0.conv.weight") for name in phases)


def test_names_tell_the_form() -> None:
    weight = np.arange(9.0, dtype=np.float32).reshape(1, 1, 3, 3)
    known = {"a.weight::T", "b.weight", *(f"c.weight{ending}" for ending in PHASES)}
    assert stored_names("a.weight", known) == ("a.weight::T",)
    assert stored_names("b.weight", known) == ("b.weight",)
    assert stored_names("c.weight", known) == tuple(f"c.weight{ending}" for ending in PHASES)
    assert stored_names("d.weight", known) == ()
    assert {parameter_of(name) for name in known} == {"a.weight", "b.weight", "c.weight"}
    assert is_phase("c.weight::UP10")
    assert not is_phase("a.weight::T")
    found = stored_value("c.weight::UP01", weight)
    # row 0: (w_0, w_1 + w_2); column 1: (w_0 + w_1, w_2)
    assert found.tolist() == [[[[0 + 1, 2], [3 + 4 + 6 + 7, 5 + 8]]]]
    assert found.flags.c_contiguous
    assert phase_kernel(weight, 0, 1).sum() == weight.sum()  # no tap is lost


def test_new_weights_reach_all_four_kernels() -> None:
    """As when an adapter is merged, or weights come back from distillation."""
    other = graph_of(Spec())
    weight = np.random.default_rng(2).normal(size=(OUT, IN, 3, 3)).astype(np.float32)
    (place,) = (t for t in other.graph.initializer if t.name == "conv.weight")
    place.CopyFrom(numpy_helper.from_array(weight, "conv.weight"))
    x = picture(4, 6)
    model = ir.from_proto(rewritten(graph_of(Spec())))
    replace_weights(model, {"conv.weight": weight})
    np.testing.assert_allclose(
        run(ir.to_proto(model), x)[0], run(other, x)[0], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ExportError, match="conv.weight has shape"):
        replace_weights(model, {"conv.weight": weight[:2]})
    layers = layers_of(model, ("Conv",))
    assert [layer.name for layer in layers] == ["conv.weight"] * 4
    assert [layer.weight for layer in layers] == [f"conv.weight{ending}" for ending in PHASES]


def test_a_refit_gives_an_engine_its_four_kernels() -> None:
    weight = np.random.default_rng(2).normal(size=(OUT, IN, 3, 3)).astype(np.float16)
    known = {f"up.weight{ending}" for ending in PHASES}
    found = stored_weights({"up.weight": weight}, known)
    assert set(found) == known
    for ending, (row, column) in PHASES.items():
        assert np.array_equal(found[f"up.weight{ending}"], phase_kernel(weight, row, column))
    with pytest.raises(RuntimeSettingError, match="no refittable weight down.weight"):
        stored_weights({"down.weight": weight}, known)
