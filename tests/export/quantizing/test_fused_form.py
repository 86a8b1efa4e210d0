"""The fused graph of a quantized folder draws what the folder's components draw."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from fewstep.errors import ExportError
from fewstep.export.quantizing.fused_form import check_fusable, write_fused
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import chosen_components, quantize_into
from fewstep.export.quantizing.schemes import Int8Dynamic, Int8Static, Scheme
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.manifest import read_manifest
from tests.digits_exports import exported
from tests.export.expert_exports import exported_experts
from tests.export.quantizing.folders import PROMPTS

SEEDS = range(6)
INTEGERS = {"MatMulInteger", "ConvInteger", "QuantizeLinear", "DynamicQuantizeLinear"}


def quantized(source: Path, folder: Path, scheme: Scheme) -> Path:
    """Components in few bits and the fused graph made of them."""
    opened = ExportFolder.open(source)
    names = chosen_components(opened, ())
    plan = Plan(scheme, names, parse_skips([]), PROMPTS[:2], threads=1)
    folder.mkdir()
    quantize_into(opened, folder, plan, progress=lambda _: None)
    write_fused(opened, folder)
    return folder


def source_of(model: str) -> Path:
    if model == "experts":
        return exported_experts(0.0).folder
    return exported("sd15" if model == "sd15" else "sd3").folder


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("sd3", Int8Dynamic()),
        ("sd3", Int8Static()),
        ("sd3", Int8Static("int8")),
        ("sd15", Int8Static()),
        ("experts", Int8Dynamic()),
    ],
    ids=lambda one: one if isinstance(one, str) else one.precision,
)
def test_pixels_and_size_are_those_of_the_components(
    model: str, scheme: Scheme, tmp_path: Path
) -> None:
    folder = quantized(source_of(model), tmp_path / "out", scheme)
    components = FewStepRuntime.load(folder, provider="cpu", has_cache=False)
    fused = FusedRuntime.load(folder, has_cache=False)
    for seed in SEEDS:
        prompts = list(PROMPTS[: 1 + seed % 3])
        wanted = components(prompts, seed=seed).pixels.astype(int)
        assert wanted.std() > 1
        assert np.abs(fused(prompts, seed=seed).pixels - wanted).max() <= 1
    manifest = read_manifest(folder)
    assert manifest.graphs["fused"].precision == scheme.precision
    assert [m.where for m in manifest.measured if m.what == "fused"] == ["batch 1", "batch 3"]
    parts = sum(size_of(folder, n) for n in manifest.graphs if n not in ("fused", "vae_encoder"))
    assert size_of(folder, "fused") <= 1.02 * parts


def size_of(folder: Path, name: str) -> int:
    return sum(file.stat().st_size for file in (folder / name).glob("model.onnx*"))


def test_the_graph_computes_in_few_bits_and_names_every_set_of_operators(tmp_path: Path) -> None:
    folder = quantized(source_of("sd3"), tmp_path / "out", Int8Dynamic())
    model = onnx.load(folder / "fused/model.onnx", load_external_data=False)
    assert {node.op_type for node in model.graph.node} & INTEGERS
    known = {entry.domain for entry in model.opset_import}
    assert {node.domain for node in model.graph.node} <= known
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    int8 = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(int8) > 20  # each weight once, whatever the number of steps
    assert read_manifest(folder).settings["fused_steps"] == 4


@pytest.mark.parametrize(
    ("precision", "activations", "said"),
    [
        ("int4", "uint8", "--fused got int4, whose pixels change"),
        ("fp8", "uint8", "--fused got fp8"),
        ("int8-static", "uint16", "--fused got int8-static with uint16, .* activations of 8 bits"),
    ],
)
def test_what_draws_other_pixels_is_refused(precision: str, activations: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        check_fusable(precision, activations)
