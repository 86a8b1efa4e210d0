"""A disk that fills up while graphs are written: one sentence, and nothing is left."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.digits_exports import exported
from tests.export.quantizing.folders import prompts_file

QUANTIZERS = "fewstep.export.quantizing"
QUANTIZE = ["quantize", "{folder}", "--prompts", "{prompts}", "--force", "--precision"]
ONNX = ["onnx", "--base", "digits-sd3", "--adapter", "{adapter}"]
IN_FEWER_BITS = ["--prompts", "{prompts}", "--precision", "int8-dynamic", "--force"]


def slow(*values: object) -> Any:
    """A case that few changes can break."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run_full(limit: int, where: str, argv: list[str], out: Path) -> subprocess.CompletedProcess:
    """The command in a process whose files may not grow beyond a limit, from a function on."""
    made = exported("sd3")
    names = {"folder": made.folder, "prompts": prompts_file(), "adapter": made.adapter}
    command = [sys.executable, "-m", "tests.export.full_disk", str(limit), where]
    command += [word.format(**names) for word in [*argv, "--out", str(out)]]
    environment = {**os.environ, "TMPDIR": str(out.parent / "tmp")}
    (out.parent / "tmp").mkdir(parents=True)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("limit", "where", "argv"),
    [
        # the float graph that the quantizer reads is 60 kB, its weights 4.5 MB
        (100_000, f"{QUANTIZERS}.quantized_folder:_quantize", [*QUANTIZE, "int8-dynamic"]),
        (40_000, f"{QUANTIZERS}.quantized_folder:_quantize", [*QUANTIZE, "int8-static"]),
        slow(100_000, f"{QUANTIZERS}.quantized_folder:_save", [*QUANTIZE, "int4"]),
        slow(1_000_000, f"{QUANTIZERS}.quantized_folder:quantize_into", [*QUANTIZE, "int4"]),
        (1_000_000, f"{QUANTIZERS}.fused_form:add_fused", [*QUANTIZE, "int8-dynamic", "--fused"]),
        slow(500, f"{QUANTIZERS}.quantized_folder:write_manifest", [*QUANTIZE, "int4"]),
        (1_000_000, "fewstep.export.onnx_folder:write_folder", ONNX),
        slow(2000, "fewstep.export.onnx_folder:_write_companions", ONNX),
        slow(1_000_000, "fewstep.export.onnx_folder:write_folder", [*ONNX, *IN_FEWER_BITS]),
        slow(1_000_000, f"{QUANTIZERS}.quantized_folder:quantize_into", [*ONNX, *IN_FEWER_BITS]),
    ],
    ids=[
        *("quantizer", "calibration", "saving", "copying", "fused", "manifest", "onnx"),
        *("tokenizer", "onnx before int8", "onnx in int8"),
    ],
)
def test_nothing_is_left_half_written(
    limit: int, where: str, argv: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "place/out"
    done = run_full(limit, where, argv, out)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    told = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert told.startswith(f"fewstep export: {out} could not be written (")
    assert told.endswith("); make room or choose another place, nothing was left behind")
    assert [path.name for path in out.parent.iterdir()] == ["tmp"]
    assert list((out.parent / "tmp").rglob("*.onnx*")) == []
