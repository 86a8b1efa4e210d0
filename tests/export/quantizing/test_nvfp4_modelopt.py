"""nvfp4 as nvidia-modelopt writes it; skipped where that is not installed."""

import io
import json
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console

from fewstep.export.quantizing.command import QuantizeOptions, run
from fewstep.export.quantizing.nvfp4_scheme import BLOCK, NvFp4
from fewstep.export.quantizing.nvfp4_twin import stored_weight, twin_folder
from fewstep.export.quantizing.plan import Plan, Result
from fewstep.export.quantizing.quantized_folder import quantize_into
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.export.tensorrt.legality import check_graph
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.onnx_session import OnnxLoader
from tests.export.quantizing.folders import PROMPTS, feeds, prompts_file, relative, source

if find_spec("modelopt") is None:
    pytest.skip("nvidia-modelopt is not installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it names the versions of others that it was not tried with
    import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]
    from modelopt.onnx.export import (  # pyright: ignore[reportMissingImports]
        NVFP4QuantExporter,
    )
    from modelopt.torch.quantization import tensor_quant  # pyright: ignore[reportMissingImports]
    from modelopt.torch.quantization.export_onnx import (  # pyright: ignore[reportMissingImports]
        configure_linear_module_onnx_quantizers,
    )
    from modelopt.torch.quantization.qtensor import (  # pyright: ignore[reportMissingImports]
        NVFP4QTensor,
    )

LAYER = "model.transformer_blocks.0.attn.to_q.weight"


@cache
def quantized() -> tuple[ExportFolder, Result]:
    folder = Path(mkdtemp(prefix="fewstep-test-"))
    plan = Plan(NvFp4(), ("transformer",), parse_skips([]), PROMPTS, threads=1)
    _, results = quantize_into(source(), folder, plan, progress=lambda _: None)
    return ExportFolder.open(folder, verify=True), results[0]


def model_of(folder: ExportFolder) -> onnx.ModelProto:
    return onnx.load(folder.root / "transformer/model.onnx")


def weights(folder: ExportFolder) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model_of(folder).graph.initializer}


def imitated(value: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Rounded by modelopt's own torch code."""
    tensor = torch.from_numpy(value.copy())
    known = None if scale is None else torch.tensor(scale)
    scales, whole = NVFP4QTensor.get_weights_scaling_factor(tensor, BLOCK, known)
    made, _, _ = NVFP4QTensor.quantize(tensor, BLOCK, scales, whole)
    settings = {"scale": scales, "double_scale": whole, "block_sizes": {-1: BLOCK}}
    return made.dequantize(dtype=torch.float32, **settings).numpy()


def test_the_graph_is_valid_and_small() -> None:
    folder, result = quantized()
    model = model_of(folder)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    inputs = [tensor.name for tensor in folder.manifest.graphs["transformer"].inputs]
    assert [value.name for value in model.graph.input] == inputs
    assert result.skipped == ("model.proj_out.weight",)
    assert result.ratio < 0.2
    assert folder.manifest.precision == "nvfp4"
    told = json.loads((folder.root / "quantization.json").read_text())
    assert told["made_by"] == "nvidia-modelopt"


def test_weights_and_scales_are_what_the_formula_says() -> None:
    folder, result = quantized()
    held, exact = weights(folder), weights(source())
    for name in result.quantized:
        known = exact[f"{name}::T"].T if f"{name}::T" in exact else exact[name]
        four, eight, scale = (
            held[f"{name}{end}"] for end in ("_f4", "_f8_scale", "_f8_scale_f32_scale")
        )
        assert scale == np.abs(known).max() / np.float32(2688)
        wanted = np.abs(known.reshape(len(known), -1, BLOCK)).max(-1) / (np.float32(6) * scale)
        assert (wanted.clip(2.0**-9, 448).astype(eight.dtype) == eight).all()
        found = stored_weight(four, eight, scale)
        assert 0.06 < relative(known, found) < 0.12
        assert np.array_equal(found, imitated(np.ascontiguousarray(known)))


def test_layers_of_the_twin_compute_as_modelopt_rounds() -> None:
    folder, result = quantized()
    held = weights(folder)
    with twin_folder(folder) as twin:
        model = model_of(twin)
    ends = {node.name: node.output[0] for node in model.graph.node}
    starts = {n.name: n.input[0] for n in model_of(folder).graph.node if "FP4" in n.op_type}
    names = [n for n in result.quantized if n.startswith("model.transformer_blocks")]
    asked = [v for n in names for v in (starts[f"{n}_quantize"], ends[f"{n}_float"])]
    values = intermediate(model, sorted(set(asked)))
    for name in names:
        stored = (held[f"{name}{e}"] for e in ("_f4", "_f8_scale", "_f8_scale_f32_scale"))
        given = imitated(values[starts[f"{name}_quantize"]], float(held[f"{name}_input_scale"]))
        weight = stored_weight(*stored)
        wanted = halves(given) @ halves(weight).T
        assert relative(wanted, values[ends[f"{name}_float"]]) < 2e-3


def halves(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).astype(np.float32)


def intermediate(model: onnx.ModelProto, names: list[str]) -> dict[str, np.ndarray]:
    import onnxruntime

    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(names, dict(feeds()[1]))
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def test_the_answer_stays_near() -> None:
    folder, _ = quantized()
    float_graph = source().manifest.graphs["transformer"]
    theirs = OnnxLoader(source().root, {}, threads=1, has_cache=False).load(float_graph)
    with twin_folder(folder) as twin:
        graph = twin.manifest.graphs["transformer"]
        ours = OnnxLoader(twin.root, {}, threads=1, has_cache=False).load(graph)
    errors = [relative(*(s.run(f)["out_hidden_states"] for s in (theirs, ours))) for f in feeds()]
    assert 1e-3 < max(errors) < 0.35  # of int4 in test_schemes, which leaves activations alone
    assert not list(folder.root.parent.glob(".twin-*"))


def path_to_product(nodes: list[Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """Operators and attributes that one product's inputs go through, outermost last."""
    made = {value: node for node in nodes for value in node.output}
    node = next(n for n in nodes if n.op_type == "MatMul" and name in reach(made, n))
    found, waiting = [], list(node.input)
    while waiting:
        before = made.get(waiting.pop(0))
        if before is None or before.op_type == "Constant":
            continue
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in before.attribute}
        found.append((before.op_type, settings))
        if before.op_type != "TRT_FP4DynamicQuantize":
            waiting += before.input
    return found


def reach(made: dict[str, Any], node: Any) -> set[str]:
    """Names of all that leads to a node's second input."""
    found, waiting = set[str](), [node.input[1]]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += made[name].input if name in made else ()
    return found


def test_a_layer_has_the_form_of_modelopts_own_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 32))
    given = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "layer.onnx"
    # tracing computes as well, and its kernel is one of CUDA: the numbers are not looked at
    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", lambda inputs, *_: inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mtq.quantize(net, mtq.NVFP4_DEFAULT_CFG, lambda module: module(given))
        with configure_linear_module_onnx_quantizers(net):
            torch.onnx.export(net, (given,), file, dynamo=False, opset_version=20)
    plain = onnx.shape_inference.infer_shapes(onnx.load(file))
    theirs = path_to_product(
        list(NVFP4QuantExporter.process_model(plain).graph.node), "0.weight_f4"
    )
    ours = path_to_product(list(model_of(quantized()[0]).graph.node), f"{LAYER}_f4")
    assert ours == theirs
    assert [kind for kind, _ in ours].count("DequantizeLinear") == 4


def test_the_command_publishes_it_unverified(tmp_path: Path) -> None:
    told = Console(file=io.StringIO(), width=200)
    out = tmp_path / "out"
    options = QuantizeOptions(
        folder=source().root,
        out=out,
        precision="nvfp4",
        prompts=prompts_file(),
        threads=1,
        force=True,
    )
    run(options, told)
    manifest = ExportFolder.open(out, verify=True).manifest
    assert not manifest.verified
    assert {"dB", "SSIM"} <= {one.unit for one in manifest.measured}
    assert not {"ms", "ratio of time"} & {one.unit for one in manifest.measured}
    assert "no engine was built" in told.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_speaks_against_it_for_tensorrt() -> None:
    folder, _ = quantized()
    report = check_graph(folder.root / "transformer/model.onnx", tensorrt=(10, 14))
    assert report.findings == ()
    assert report.operators["TRT_FP4DynamicQuantize"] == 31
