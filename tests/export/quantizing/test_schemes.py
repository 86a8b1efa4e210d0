"""What the quantizers write, held against arithmetic and against the float graph."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fewstep.errors import ExportError, ExportFolderError, MissingExtraError
from fewstep.export.__main__ import main
from fewstep.export.quantizing.fake_rounding import PerBlock, PerChannel, PerTensor
from fewstep.export.quantizing.plan import Plan, Result
from fewstep.export.quantizing.quantized_folder import (
    chosen_components,
    open_float_folder,
    quantize_into,
)
from fewstep.export.quantizing.schemes import Int4, Int8Dynamic, Int8Static, Scheme
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.export.tensorrt.legality import check_graph
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.onnx_session import OnnxLoader
from tests.export.quantizing.folders import PROMPTS, copied, feeds, relative, source

LAYER = "model.transformer_blocks.0.attn.to_q.weight"
SCHEMES = {
    "dynamic": Int8Dynamic(),
    "static": Int8Static(),
    "wide": Int8Static("uint16"),
    "symmetric": Int8Static("int8"),
    "four": Int4(),
}
LIMITS = {"dynamic": 0.06, "static": 0.12, "wide": 0.06, "symmetric": 0.12, "four": 0.35}
"""Relative errors of one call. A random adapter makes a harder network than a trained one."""
SIZES = {"dynamic": 0.30, "static": 0.30, "wide": 0.30, "symmetric": 0.30, "four": 0.20}


@cache
def quantized(name: str) -> tuple[ExportFolder, Result]:
    folder = Path(mkdtemp(prefix="fewstep-test-"))
    plan = Plan(SCHEMES[name], ("transformer",), parse_skips([]), PROMPTS, threads=1)
    _, results = quantize_into(source(), folder, plan, progress=lambda _: None)
    return ExportFolder.open(folder, verify=True), results[0]


def weights(folder: ExportFolder) -> dict[str, np.ndarray]:
    model = onnx.load(folder.root / "transformer/model.onnx")
    return {held.name: numpy_helper.to_array(held) for held in model.graph.initializer}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_answer_stays_near_and_the_file_gets_small(name: str) -> None:
    folder, result = quantized(name)
    graph = folder.manifest.graphs["transformer"]
    float_graph = source().manifest.graphs["transformer"]
    ours = OnnxLoader(folder.root, {}, threads=1, has_cache=False).load(graph)
    theirs = OnnxLoader(source().root, {}, threads=1, has_cache=False).load(float_graph)
    errors = [relative(*(s.run(f)["out_hidden_states"] for s in (theirs, ours))) for f in feeds()]
    assert 1e-4 < max(errors) < LIMITS[name]
    assert result.ratio <= SIZES[name]
    assert graph.precision == SCHEMES[name].precision == folder.manifest.precision


@pytest.mark.parametrize("name", SCHEMES)
def test_the_folder_is_whole_and_says_what_was_done(name: str) -> None:
    folder, result = quantized(name)
    told = json.loads((folder.root / "quantization.json").read_text())
    assert told["precision"] == folder.manifest.precision
    assert told["components"][0]["skipped"] == list(result.skipped)
    assert "model.proj_out.weight" in result.skipped
    assert LAYER in result.quantized
    opsets = {
        o.domain: o.version
        for o in onnx.load(
            folder.root / "transformer/model.onnx", load_external_data=False
        ).opset_import
    }
    assert folder.manifest.graphs["transformer"].opset == opsets[""]
    assert "fused" not in folder.manifest.graphs  # its weights would be the float ones
    assert not (folder.root / ".work").exists()
    same = "vae_decoder/model.onnx_data"
    assert folder.manifest.files[same] == source().manifest.files[same]


def test_eight_bits_are_rounded_as_training_imitates_it() -> None:
    held = weights(quantized("dynamic")[0])
    exact = weights(source())[f"{LAYER}::T"]
    written = held[f"{LAYER}::T_quantized"].astype(np.float32) * held[f"{LAYER}::T_scale"]
    imitated = PerChannel()(torch.from_numpy(exact.T.copy())).numpy().T
    assert np.abs(written - imitated).max() < 1e-6
    assert np.abs(written - exact).max() > 1e-5


def test_four_bits_are_rounded_as_training_imitates_it() -> None:
    held = weights(quantized("four")[0])
    exact = weights(source())[f"{LAYER}::T"].T.copy()
    packed = held[f"{LAYER}::T_Q4"].reshape(exact.shape[0], -1)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(exact.shape)
    scales = held[f"{LAYER}::T_scales"].reshape(exact.shape[0], -1).repeat(32, axis=1)
    written = (nibbles.astype(np.float32) - 8) * scales
    imitated = PerBlock(32)(torch.from_numpy(exact)).numpy()
    step = np.abs(scales).max()
    assert np.mean(np.abs(written - imitated) > step / 100) < 2e-3  # ties may round either way
    assert np.abs(written - imitated).max() < 1.01 * step


def test_activations_are_rounded_as_the_graph_does() -> None:
    value = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
    scale = np.float32((high - low) / 255)
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    back = onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    types = (onnx.TensorProto.FLOAT, [7, 33])
    graph = onnx.helper.make_graph(
        [node, back],
        "g",
        [onnx.helper.make_tensor_value_info("x", *types)],
        [onnx.helper.make_tensor_value_info("y", *types)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    wanted = np.asarray(session.run(None, {"x": value.numpy()})[0])
    assert np.abs(PerTensor()(value).numpy() - wanted).max() < scale * 1e-3


def test_rounding_passes_the_gradient_by() -> None:
    for rounding in (PerChannel(), PerBlock(16), PerTensor()):
        value = torch.randn(4, 40, requires_grad=True)
        rounding(value).sum().backward()
        assert value.grad is not None
        assert torch.equal(value.grad, torch.ones_like(value))


def test_the_symmetric_form_is_what_tensorrt_takes() -> None:
    folder, _ = quantized("symmetric")
    report = check_graph(folder.root / "transformer/model.onnx", tensorrt=(11, 4))
    assert [f for f in report.findings if f.rule != "opset"] == []
    assert report.operators["QuantizeLinear"] > 20
    zeros = [v for n, v in weights(folder).items() if n.endswith("zero_point")]
    assert zeros
    assert all((np.asarray(v) == 0).all() for v in zeros)


def test_only_float_folders_are_quantized(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is in int4; quantize an fp32 folder"):
        open_float_folder(quantized("four")[0].root)
    with pytest.raises(ExportFolderError, match="does not exist"):
        open_float_folder(tmp_path / "missing")


def test_components_that_are_not_there_are_named() -> None:
    assert chosen_components(source(), ()) == ("transformer",)
    with pytest.raises(ExportError, match="has no 'unet'; --components may name"):
        chosen_components(source(), ["unet"])


def test_text_encoders_are_quantized_too(tmp_path: Path) -> None:
    names = ("text_encoder", "text_encoder_2")
    plan = Plan(Int4(), names, parse_skips([]), PROMPTS, threads=1)
    folder = tmp_path / "out"
    folder.mkdir()
    manifest, results = quantize_into(source(), folder, plan, progress=lambda _: None)
    assert manifest.graphs["text_encoder"].precision == "int4"
    assert manifest.precision == "fp32"  # of the denoiser
    assert all(result.quantized for result in results)


def test_static_ranges_need_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no inputs to calibrate with"):
        Int8Static().quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", (), ())


def test_modelopt_is_asked_for_by_its_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.util import find_spec

    from fewstep.export.quantizing.modelopt_scheme import ModelOptFp8

    if find_spec("modelopt") is not None:
        pytest.skip("nvidia-modelopt is installed")
    with pytest.raises(MissingExtraError, match=r"fewstep\[modelopt\]"):
        ModelOptFp8()
    argv = ["quantize", str(source().root), "--precision", "fp8", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "fewstep[modelopt]" in capsys.readouterr().err


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    data = copied(tmp_path / "cut") / "transformer/model.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ExportFolderError, match=r"model.onnx_data in .* bytes where"):
        open_float_folder(tmp_path / "cut")
    other = copied(tmp_path / "changed") / "transformer/model.onnx_data"
    content = bytearray(other.read_bytes())
    content[1000] ^= 255
    other.write_bytes(bytes(content))
    with pytest.raises(ExportFolderError, match="its checksum differs"):
        open_float_folder(tmp_path / "changed")


def test_schemes_describe_themselves() -> None:
    for scheme in SCHEMES.values():
        assert isinstance(scheme, Scheme)
        assert "weights" in scheme.notes
