"""What ONNX Runtime is asked for, and that an engine which does not start is refused by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import RuntimeSettingError
from fewstep.runtime import onnx_session, providers
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.onnx_providers import PROVIDERS, asked_providers, check_running
from fewstep.runtime.onnx_session import OnnxLoader, available_providers
from tests.digits_exports import exported

ABSENT = next(name for name in PROVIDERS if name not in available_providers())
"""A provider that this ONNX Runtime cannot start: it goes on without, as it does without CUDA."""
CPU = ("CPUExecutionProvider", {})
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says that it has every provider, as its GPU package does on any machine."""
    monkeypatch.setattr(onnx_session, "available_providers", lambda: tuple(PROVIDERS))


def test_the_processor_is_last_and_products_are_full_float32() -> None:
    assert asked_providers("cpu") == [CPU]
    assert asked_providers("cuda") == [CUDA, CPU]
    assert asked_providers("coreml") == [("CoreMLExecutionProvider", {}), CPU]
    assert asked_providers("tensorrt") == [("TensorrtExecutionProvider", {}), CUDA, CPU]


def test_tensorrt_keeps_engines_and_timings(tmp_path: Path) -> None:
    folder = str(tmp_path)
    wanted = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    found = asked_providers("tensorrt", tmp_path)
    assert found == [("TensorrtExecutionProvider", wanted), CUDA, CPU]


@pytest.mark.usefixtures("claimed")
def test_engines_are_kept_below_the_cache_by_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ExportFolder.open(exported("sd3").folder)
    graph, files = opened.manifest.graphs["transformer"], opened.manifest.files
    other = graph.file + "_data"
    changed = {**files, other: replace(files[other], sha256="0" * 64)}
    folders = [OnnxLoader(opened.root, f, "tensorrt")._engines(graph) for f in (files, changed)]
    assert len(set(folders)) == 2
    assert {one.parent for one in folders if one} == {tmp_path / "cache" / "onnxruntime-tensorrt"}
    assert all(one.is_dir() for one in folders if one)
    assert OnnxLoader(opened.root, files, "tensorrt", has_cache=False)._engines(graph) is None
    assert OnnxLoader(opened.root, files, "cuda")._engines(graph) is None
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    assert OnnxLoader(opened.root, files, "tensorrt")._engines(graph) is None


def test_what_runs_elsewhere_is_refused() -> None:
    check_running("cpu", [CPU[0]])
    check_running("tensorrt", ["TensorrtExecutionProvider", CUDA[0], CPU[0]])
    said = 'tensorrt was asked for.* runs on cuda, cpu; install .* use provider "cuda"$'
    with pytest.raises(RuntimeSettingError, match=said):
        check_running("tensorrt", [CUDA[0], CPU[0]])


@pytest.mark.usefixtures("claimed")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_refused_by_name() -> None:
    opened = ExportFolder.open(exported("sd3").folder)
    loader = OnnxLoader(opened.root, opened.manifest.files, ABSENT)
    said = f'provider {ABSENT} was asked for.* runs on cpu; install .* use provider "cpu"$'
    with pytest.raises(RuntimeSettingError, match=said):
        loader.load(opened.manifest.graphs["transformer"])


@pytest.mark.usefixtures("claimed")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_auto_leaves_out_what_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = "coreml" if ABSENT == "tensorrt" else ABSENT  # that one is looked for beforehand
    monkeypatch.setattr(providers, "candidates", lambda: [absent, "cpu"])
    monkeypatch.setattr(providers, "ENOUGH_S", 0.0)
    folder = exported("sd3").folder
    with pytest.warns(UserWarning, match=f"provider {absent} is left out: .* runs on cpu"):
        found = FewStepRuntime.load(folder, provider="auto", threads=1)
    assert found.provider == "cpu"
    wanted = FewStepRuntime.load(folder, provider="cpu", threads=1)
    assert np.array_equal(found("a one", seed=5).pixels, wanted("a one", seed=5).pixels)
