"""`fewstep zoo`: what each action prints, for people and for programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.cli.main import main
from fewstep.recipe import FewStepRecipe
from fewstep.zoo import entries, entry

ROOT = Path(__file__).resolve().parents[1]
NO_TORCH = """
import sys
from fewstep.cli.main import main
status = main(["zoo", *sys.argv[1:]])
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small weights file called like a known one, of no known family."""
    path = tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors"
    save_file({"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.ones(4, 2)}, path)
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["zoo", *argv]) == 0
    return capsys.readouterr().out


def test_list_has_every_entry_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [found.name for found in entries()]
    lightning = next(line for line in lines if line.startswith("sdxl-lightning-4step-lora"))
    assert lightning.split() == "sdxl-lightning-4step-lora sdxl 4 yes card lora none".split()


def test_list_of_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "list", "--family", "sana-sprint", "--json"))["entries"]
    assert [each["name"] for each in found] == ["sana-sprint-0.6b", "sana-sprint-1.6b"]
    assert found[0]["steps"] == "1-4"
    assert found[0]["guidance"] == "embedded 4.5"


def test_show_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "wan2.2-lightning-i2v-a14b")
    assert "high_noise_model.safetensors (high_noise)" in text
    assert "read in the authors' own code" in text
    assert '"sigma_low": 0.9' in text
    data = json.loads(said(capsys, "show", "zoo:wan2.2-lightning-i2v-a14b", "--json"))
    assert data["verification"] == "authors"
    assert data["recipe"]["default_steps"] == 4


def test_show_marks_what_is_unverified_and_what_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "UNVERIFIED, written from memory" in said(capsys, "show", "sd-turbo")
    assert "refused        its network takes a target time" in said(
        capsys, "show", "anyflow-wan2.1-1.3b"
    )


def test_the_recipe_alone_is_a_recipe_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    for flags in ([], ["--json"]):
        path.write_text(said(capsys, "show", "tcd-sdxl-lora", "--recipe-only", *flags))
        assert FewStepRecipe.from_file(path) == entry("tcd-sdxl-lora").recipe


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert "qwen-image-lightning-8steps" in said(capsys, "search", "qwen", "Lightning", "8steps")
    assert said(capsys, "search", "unobtainium") == "no entry of the zoo has all of: unobtainium\n"
    assert json.loads(said(capsys, "search", "unobtainium", "--json")) == {"entries": []}


def test_fingerprint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(said(capsys, "fingerprint", str(copy), "--json"))
    assert data["entry"] == "dmd2-sdxl-4step-lora"
    assert data["found_by"] == "file name"
    assert data["tensors"] == 2
    assert all(len(data[key]) == 64 for key in ("sha256", "fingerprint", "head"))
    text = said(capsys, "fingerprint", str(copy.rename(copy.with_name("mine.safetensors"))))
    assert f"sha256       {data['sha256']}" in text
    assert "entry        none" in text


def test_inspect_says_what_the_zoo_knows_of_a_file_without_a_recipe(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(copy)]) == 0
    assert "zoo       zoo:dmd2-sdxl-4step-lora (by file name)" in capsys.readouterr().out
    similar = copy.rename(copy.with_name("my_dmd2_sdxl_4step_lora_fp16.safetensors"))
    assert main(["inspect", str(similar)]) == 0
    assert "zoo       looks like zoo:dmd2-sdxl-4step-lora" in capsys.readouterr().out
    other = similar.rename(similar.with_name("unobtainium.safetensors"))
    assert main(["inspect", str(other), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)["zoo"]
    assert known == {"entry": None, "found_by": None, "similar": []}


def test_fingerprint_of_another_format_is_its_sha256(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "unet.bin"
    path.write_bytes(b"abc")
    data = json.loads(said(capsys, "fingerprint", str(path), "--json"))
    assert data["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert set(data) == {"file", "sha256"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "dmd2"], "no entry 'dmd2'; did you mean dmd2-sdxl-1step-unet or dmd2-sdxl-4step"),
        (["show", "pi-flux2", "--recipe-only"], "zoo:pi-flux2 (pi-FLUX.2) is not supported: it"),
        (["show", "instaflow-0.9b", "--recipe-only"], "zoo:instaflow-0.9b (InstaFlow"),
        (["list", "--family", "sdxxl"], "the zoo has no family 'sdxxl'; it has ace-step"),
        (["search"], "at least one word"),
        (["fingerprint", "nowhere.safetensors"], "nowhere.safetensors: cannot be read"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["zoo", *argv]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert heard.err.count("\n") == 1
    assert words in heard.err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "list", "--quiet") == ""


@pytest.mark.parametrize("argv", [["list"], ["show", "sd-turbo"], ["search", "wan"]])
def test_it_needs_no_torch(argv: list[str]) -> None:
    command = [sys.executable, "-c", NO_TORCH, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
