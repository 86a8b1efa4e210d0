"""The runtime in an environment that has neither torch nor diffusers nor transformers."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.digits_exports import exported

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib.util, sys
import numpy as np
from fewstep import FewStepRuntime

for name in ("torch", "diffusers", "transformers", "onnx"):
    assert importlib.util.find_spec(name) is None, name
found = FewStepRuntime.load(sys.argv[1], provider="cpu")(["a handwritten two"] * 2, seed=3)
np.save(sys.argv[2], found.pixels)
"""


@pytest.mark.network
def test_it_draws_where_torch_is_not_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / "alone", with_pip=True)
    scripts = tmp_path / "alone" / ("Scripts" if sys.platform == "win32" else "bin")
    python = str(scripts / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[runtime]"], check=True)
    folder, out = exported("sd3", 1.0).folder, tmp_path / "pixels.npy"
    subprocess.run([python, "-c", PROGRAM, str(folder), str(out)], check=True, cwd=tmp_path)
    draw = [str(scripts / "fewstep"), "draw", str(folder), "--prompt", "a handwritten two"]
    subprocess.run([*draw, "--out", str(tmp_path / "pictures")], check=True, cwd=tmp_path)
    wanted = FewStepRuntime.load(folder, provider="cpu")(["a handwritten two"] * 2, seed=3).pixels
    assert np.abs(np.load(out).astype(int) - wanted).max() <= 1
    assert list((tmp_path / "pictures").glob("*.png"))
