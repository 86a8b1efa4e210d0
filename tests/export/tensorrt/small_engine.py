"""The engine of the small denoiser: built, opened, fed, and what it must give."""

from pathlib import Path

import numpy as np
import onnx
from rich.progress import Progress

from fewstep.export.tensorrt.build import build_engine
from fewstep.export.tensorrt.command import TensorRtOptions, make_plans
from fewstep.export.tensorrt.plan import EnginePlan
from fewstep.runtime.manifest import read_manifest
from fewstep.runtime.tensorrt.identity import Engine
from fewstep.runtime.tensorrt.opening import open_session
from fewstep.runtime.tensorrt.session import TensorRtSession
from tests.export.tensorrt.fake_engine import model_path, session


def plan_of(folder: Path, **options: object) -> EnginePlan:
    """What would be built."""
    (plan,) = make_plans(
        TensorRtOptions(folder=folder, target="sm90", size=("64x64", "96x64"), **options)  # type: ignore[arg-type]
    )
    return plan


def build(folder: Path, **options: object) -> Engine:
    """Build it; no bars are shown."""
    return build_engine(plan_of(folder, build=True, **options), Progress(disable=True))


def opened(folder: Path) -> TensorRtSession:
    """Its session."""
    return open_session(folder, read_manifest(folder), "transformer")


def feeds(batch: int = 1, height: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs."""
    rng = np.random.default_rng(seed)
    return {
        "hidden_states": rng.normal(size=(batch, 4, height, 8)).astype(np.float32),
        "timestep": np.array([0.5], np.float32),
    }


def expected(folder: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What ONNX Runtime gives."""
    (value,) = session(onnx.load(model_path(folder))).run(None, inputs)
    return np.asarray(value)


def write_lora(folder: Path) -> Path:
    """A LoRA that changes the mix."""
    from safetensors.numpy import save_file

    file = folder.parent / "lora.safetensors"
    pair = {
        "transformer.mix.lora_A.weight": np.ones((2, 4), np.float32),
        "transformer.mix.lora_B.weight": np.ones((4, 2), np.float32),
    }
    save_file(pair, file)
    return file
