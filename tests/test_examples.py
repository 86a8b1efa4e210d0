"""The examples run as they are shown, on a real export."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.export.__main__ import main
from fewstep.runtime.fused_runtime import FusedRuntime
from tests.digits_exports import exported

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_python_without_fewstep(tmp_path: Path) -> None:
    program = EXAMPLES / "python" / "draw_fused.py"
    text = program.read_text(encoding="utf-8")
    assert "import fewstep" not in text
    out = tmp_path / "seven.png"
    command = [sys.executable, str(program), str(exported("sd3").folder), "a handwritten seven"]
    subprocess.run([*command, "--out", str(out)], check=True)
    picture = np.asarray(Image.open(out))
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 10


def test_feeds_are_the_graphs_inputs(tmp_path: Path) -> None:
    out = tmp_path / "feeds.json"
    folder = exported("sd3", 1.0).folder
    assert main(["feeds", str(folder), "--prompt", "a", "--seed", "7", "--out", str(out)]) == 0
    feeds = json.loads(out.read_text())
    assert feeds["noise"]["dims"] == [1, 4, 16, 8, 8]  # the first noise and three fresh ones
    assert len(feeds["noise"]["data"]) == 4 * 16 * 8 * 8


@pytest.mark.network
def test_node_draws_the_same_picture(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    place = tmp_path / "node"
    shutil.copytree(EXAMPLES / "node", place)
    subprocess.run(["npm", "install", "--ignore-scripts"], cwd=place, check=True)
    folder, feeds = exported("sd3").folder, place / "feeds.json"
    prompt = ["--prompt", "a handwritten seven", "--seed", "7"]
    assert main(["feeds", str(folder), *prompt, "--out", str(feeds)]) == 0
    subprocess.run(
        ["node", "draw.js", str(folder), str(feeds), "picture.ppm"], cwd=place, check=True
    )
    wanted = FusedRuntime.load(folder)("a handwritten seven", seed=7).pixels[0]
    assert np.array_equal(np.asarray(Image.open(place / "picture.ppm")), wanted)
