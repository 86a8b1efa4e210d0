"""The generated repository: what is in it, and what Triton's own protobuf reads from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fewstep.errors import ExportError
from fewstep.export.triton.configs import Serving, component_config, pipeline_config
from fewstep.export.triton.pbtxt import Message, Word, render
from fewstep.export.triton.repository import write_repository
from fewstep.export.triton.scalars import lift_scalars
from fewstep.runtime.manifest import Graph, Tensor, read_manifest
from tests.export.tensorrt.small_graphs import export_folder, make_model

SIZES = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 8}
UNET = Graph(
    file="unet/model.onnx",
    inputs=(
        Tensor(name="sample", dtype="float32", dims=("batch_size", "16", "height", "width")),
        Tensor(name="timestep", dtype="float32"),
        Tensor(name="ids", dtype="int64", dims=("batch_size", "sequence_length")),
    ),
    outputs=(
        Tensor(name="out_sample", dtype="float16", dims=("batch_size", "16", "height", "width")),
    ),
    opset=18,
    precision="fp32",
)


def parsed(message: Message) -> Any:
    """Read back by Triton's definition of the format."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    definition = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(render(message), definition.ModelConfig())


def test_text_is_escaped() -> None:
    message = Message((("a", 'say "hi"\n'), ("b", Word("KIND_CPU")), ("c", True), ("d", [1, -1])))
    assert render(message) == 'a: "say \\"hi\\"\\n"\nb: KIND_CPU\nc: true\nd: [1, -1]\n'


def test_a_component_is_read_back() -> None:
    config = parsed(component_config("fewstep_unet", UNET, Serving(device="gpu"), sizes=SIZES))
    assert (config.name, config.backend, config.max_batch_size) == (
        "fewstep_unet",
        "onnxruntime",
        0,
    )
    found = {port.name: list(port.dims) for port in config.input}
    assert found == {"sample": [-1, 16, -1, -1], "timestep": [1], "ids": [-1, -1]}
    assert [port.data_type for port in config.input] == [11, 11, 9]  # FP32, FP32, INT64
    assert config.output[0].data_type == 10  # FP16
    assert config.instance_group[0].kind == 1  # KIND_GPU
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["sample"].dims) == [1, 16, 8, 8]
    assert list(warmup.inputs["timestep"].dims) == [1]


def test_the_pipeline_is_read_back() -> None:
    serving = Serving(max_batch=8, queue_delay_us=500, max_queue=9, timeout_us=7)
    config = parsed(pipeline_config("fewstep_pipeline", serving, parameters={"form": "fused"}))
    assert (config.backend, config.max_batch_size) == ("python", 8)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (9, 7)
    assert [port.name for port in config.input if not port.optional] == ["prompt"]
    assert config.parameters["form"].string_value == "fused"


def test_unknown_sizes_are_not_warmed_up() -> None:
    config = render(component_config("x", UNET, Serving(), sizes={"batch_size": 1}))
    assert "model_warmup" not in config


def test_bfloat16_has_no_place() -> None:
    wrong = Graph(
        file="x",
        inputs=(Tensor(name="x", dtype="bfloat16"),),
        outputs=(),
        opset=18,
        precision="bf16",
    )
    with pytest.raises(ExportError, match="x is bfloat16, which Triton's ONNX Runtime backend"):
        component_config("x", wrong, Serving(), sizes={})


def test_settings_out_of_range() -> None:
    with pytest.raises(ExportError, match="at least 1 of each"):
        Serving(max_batch=0)


def test_lifted_scalars_change_no_value() -> None:
    nodes = [helper.make_node("Mul", ["x", "t"], ["a"]), helper.make_node("Add", ["a", "t"], ["y"])]
    inputs = {"x": (TensorProto.FLOAT, ["batch_size", 4]), "t": (TensorProto.FLOAT, [])}
    model = make_model(nodes, inputs=inputs)
    x, t = np.arange(8, dtype=np.float32).reshape(2, 4), np.float32(3)
    (before,) = run(model, {"x": x, "t": np.array(t)})
    lift_scalars(model, {"t"})
    onnx.checker.check_model(model, full_check=True)
    (after,) = run(model, {"x": x, "t": np.array([t])})
    np.testing.assert_array_equal(after, before)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def test_the_repository_holds_what_is_needed(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "export")
    names = write_repository(folder, tmp_path / "repository", name="seven")
    assert names == ["seven_pipeline", "seven_transformer"]
    home = tmp_path / "repository"
    assert sorted(path.name for path in home.iterdir()) == names
    graph = home / "seven_transformer/1/model.onnx"
    assert graph.read_bytes() == (folder / "transformer/model.onnx").read_bytes()
    assert (home / "seven_pipeline/1/model.py").is_file()
    assert (home / "seven_pipeline/1/export/manifest.json").is_file()
    assert not list((home / "seven_pipeline").rglob("*.onnx"))


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "export")
    out = tmp_path / "repository"
    with pytest.raises(ExportError, match="has no fused graph; export with --fused"):
        write_repository(folder, out, is_fused=True)
    (folder / "transformer/model.onnx").unlink()
    with pytest.raises(ExportError, match="model.onnx is missing; export again"):
        write_repository(folder, out)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_clips_are_refused(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "export")
    manifest = read_manifest(folder)
    clips = replace(manifest, settings={**manifest.settings, "frames_per_second": 16.0})
    (folder / "manifest.json").write_text(clips.to_json())
    with pytest.raises(ExportError, match="makes clips.*`fewstep draw`$"):
        write_repository(folder, tmp_path / "repository")
