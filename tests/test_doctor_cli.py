"""`fewstep doctor`: its exit statuses, its two kinds of subject, and what it does not import."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.adapters import save_adapter
from fewstep.cli.main import main
from tests.tiny_pipelines import FLOW_GRID, flow_recipe

NO_TORCH = """
import sys
from fewstep.cli.main import main
status = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""
RANK = 3


@pytest.fixture(autouse=True)
def teachers_laid_out_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The shipped teachers are unpacked into a folder of the test run, not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "teachers"))
        yield


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on the queries of the shipped SD3 teacher's first block."""
    generator = torch.Generator().manual_seed(0)
    name = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(RANK, 128, generator=generator),
        f"{name}.lora_B.weight": torch.randn(128, RANK, generator=generator),
    }
    path = tmp_path / "student.safetensors"
    return save_adapter(
        path, tensors, recipe=flow_recipe("sd3"), rank=RANK, alpha=RANK, title="test"
    )


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", *argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_shipped_teacher_with_an_adapter(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, data = said(capsys, "digits-sd3", "--adapter", str(adapter))
    assert status == 3
    codes = [finding["code"] for finding in data["findings"]]
    assert {"grid/double-shift", "grid/not-trained", "guidance/not-off"} <= set(codes)
    trained = [timestep for timestep, _ in data["trained"]]
    assert trained == pytest.approx(FLOW_GRID)
    assert [s["timestep"] for s in data["with_fewstep"]["steps"]] == pytest.approx(trained)
    assert data["with_fewstep"]["error"] is None
    assert data["comfyui"]["sampler_name"] == "euler"


def test_a_base_of_many_steps_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "digits-sd3"]) == 0
    text = capsys.readouterr().out
    assert "nothing wrong was found" in text
    assert "10 or more" in text or "20 or more" in text


def test_a_lone_file_is_examined_without_torch(adapter: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "doctor", str(adapter)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ManualSigmas: 1, 0.9375, 0.833333, 0.625, 0" in done.stdout
    assert "nothing wrong was found" in done.stdout


def test_a_pickle_is_examined_like_any_other(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_file(adapter), tmp_path / "student.pt")
    status, data = said(capsys, str(tmp_path / "student.pt"))
    assert (status, data["findings"][0]["code"]) == (3, "recipe/none")


def test_a_lone_file_without_a_recipe_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    tensors = {"transformer.a.lora_A.weight": torch.ones(1, 2)}
    tensors["transformer.a.lora_B.weight"] = torch.ones(2, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    status, data = said(capsys, str(tmp_path))
    assert status == 3
    assert data["findings"][0]["code"] == "recipe/none"
    assert data["comfyui"] is None


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["nowhere/at/all"], "could not load 'nowhere/at/all'"),
        (["none.safetensors"], "there is no such file"),
        (["digits-sd3", "--size", "big"], "--size must be HEIGHTxWIDTH"),
        (["digits-sd3", "--device", "toaster"], "--device toaster cannot be used here"),
        (["a.safetensors", "--adapter", "b.safetensors"], "name the pipeline first"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *argv]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
