"""TensorRT and a GPU, played by ONNX Runtime and host memory."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.export.tensorrt.fake_cuda import HostGpu, fake_runtime
from tests.export.tensorrt.fake_engine import Holder, behaviours
from tests.export.tensorrt.fake_library import TENSORRT_VERSIONS, Recorder, fake_tensorrt
from tests.export.tensorrt.small_graphs import export_folder


@dataclass(frozen=True, slots=True)
class Played:
    """What a test sees of the played machine."""

    version: str
    gpu: HostGpu
    recorder: Recorder
    trt: ModuleType


@pytest.fixture(params=TENSORRT_VERSIONS)
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Played:
    """Both modules in place, once per release of TensorRT."""
    return play(request.param, monkeypatch)


def play(version: str, monkeypatch: pytest.MonkeyPatch) -> Played:
    """Put both modules in place.

    Args:
        version: Of TensorRT.
        monkeypatch: Takes them away again.
    """
    gpu, recorder, holder = HostGpu(), Recorder(), Holder()
    trt = fake_tensorrt(version, behaviours(gpu, holder), recorder)
    holder.trt = trt
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    cuda = ModuleType("cuda")
    bindings = ModuleType("cuda.bindings")
    runtime = fake_runtime("13.5.0", gpu)
    bindings.runtime = runtime  # type: ignore[attr-defined]
    for module in (cuda, bindings, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Played(version, gpu, recorder, trt)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export folder with one small component."""
    return export_folder(tmp_path / "export")
