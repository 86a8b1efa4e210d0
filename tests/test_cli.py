"""The command line: exit statuses, where things are printed, and what is not imported."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from PIL import Image

from fewstep import __version__
from fewstep.adapters import save_adapter
from fewstep.cli.main import VERBS, main
from fewstep.cli.output import Output, OutputOptions
from fewstep.cli.picture_folder import PictureFolder
from fewstep.recipe import FewStepRecipe
from tests.tiny_pipelines import flow_recipe

ROOT = Path(__file__).resolve().parents[1]
RANK = 3
NO_TORCH = """
import sys
from fewstep.cli.main import main
status = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def teachers_laid_out_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The shipped teachers are unpacked into a folder of the test run, not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "teachers"))
        yield


@pytest.fixture
def adapter_file(tmp_path: Path) -> Path:
    """A LoRA on the queries of the shipped SD3 teacher's first block."""
    generator = torch.Generator().manual_seed(0)
    name = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(RANK, 128, generator=generator),
        f"{name}.lora_B.weight": torch.randn(128, RANK, generator=generator) / 100,
    }
    recipe = flow_recipe("sd3")
    path = tmp_path / "student.safetensors"
    return save_adapter(path, tensors, recipe=recipe, rank=RANK, alpha=RANK, title="test")


def without_torch(*argv: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", NO_TORCH, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    for verb in ["train", *VERBS]:
        assert f"• {verb}" in said


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Examples:" in said
    assert f"  fewstep {verb} " in said
    assert "--quiet" in said
    assert "--json" in said


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_a_verb_are_valid(verb: str) -> None:
    text = re.sub(r"\\\n +", "", VERBS[verb].help)  # join continued lines
    examples = [line for line in text.splitlines() if line.startswith(f"  fewstep {verb} ")]
    assert examples
    for line in examples:
        command = line.strip().partition("   ")[0]
        tyro.cli(VERBS[verb].options, args=shlex.split(command)[2:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fewstep {__version__}\n"


def test_unknown_verb_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert "generate" in capsys.readouterr().err


def test_user_error_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "missing.safetensors")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fewstep: ")
    assert said.err.count("\n") == 1
    assert "missing.safetensors" in said.err


def test_wrong_option_value_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--base", "x", "--prompt", "y", "--size", "12"]) == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed", "-1"], "0 to 2**64 - 1"),
        (["--num-images", "0"], ">= 1"),
        (["--device", "toaster"], "toaster cannot be used here"),
        (["--base", "nowhere/to-be-found"], "could not load the base 'nowhere/to-be-found'"),
        (["--recipe", "missing.json"], "missing.json"),
        (["--size", "60x64"], "--size 60x64 was refused"),
    ],
)
def test_wrong_requests_to_generate_are_user_errors(
    argv: list[str],
    said: str,
    adapter_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    common = ["generate", "--base", "digits-sd3", "--adapter", str(adapter_file)]
    status = main([*common, "--prompt", "a two", "--out", str(tmp_path / "out"), *argv])
    assert (status, said in capsys.readouterr().err) == (2, True)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: OutputOptions) -> Output:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.cli.main.Output", interrupt)
    assert main(["inspect", "any.safetensors"]) == 130
    assert capsys.readouterr().err == "fewstep: stopped\n"


def test_help_and_inspect_need_no_torch(adapter_file: Path) -> None:
    assert without_torch("--help").returncode == 0
    done = without_torch("inspect", str(adapter_file), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["format"] == "fewstep.recipe/1"


def test_quiet_inspect_says_nothing(adapter_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter_file), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["inspect", str(adapter_file)]) == 0
    assert str(RANK) in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(adapter_file: Path) -> None:
    command = f"'{sys.executable}' -m fewstep inspect '{adapter_file}' | true"
    shell = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_train_passes_its_arguments_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    assert "digits-4step" in capsys.readouterr().out


def test_pictures_are_numbered_on_and_carry_their_facts(tmp_path: Path) -> None:
    recipe = flow_recipe("sd3")
    image = Image.new("RGB", (4, 4))
    for seed in (7, 8):  # two runs
        pictures = PictureFolder(tmp_path / "out", recipe.to_json())
        pictures.save(image, {"prompt": "a \u4e03", "seed": seed})
    first, second = sorted((tmp_path / "out").iterdir())
    assert (first.name, second.name) == ("0000-seed7.png", "0001-seed8.png")
    with Image.open(second) as read:
        facts: dict[str, Any] = json.loads(read.info["fewstep"])
        assert facts == {"prompt": "a \u4e03", "seed": 8}
        assert FewStepRecipe.from_json(read.info["fewstep.recipe"]) == recipe


def test_generate_draws_the_same_pictures_in_other_batches(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a handwritten seven", "a handwritten two"]
    common = ["generate", "--base", "digits-sd3", "--adapter", str(adapter_file), "--json"]
    common += ["--prompt", *prompts, "--seed", "5", "--device", "cpu"]
    for batch_size in ("1", "2"):
        out = str(tmp_path / batch_size)
        assert main([*common, "--batch-size", batch_size, "--out", out]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "\n}")
    assert [(p["prompt"], p["seed"]) for p in report["pictures"]] == [
        (prompts[0], 5),
        (prompts[1], 6),
    ]
    assert (report["steps"], report["nfe"]) == (4, 4)
    for name in ("0000-seed5.png", "0001-seed6.png"):
        with Image.open(tmp_path / "1" / name) as one, Image.open(tmp_path / "2" / name) as two:
            assert one.size == (64, 64)
            difference = [abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)]
            assert max(difference) <= 1  # batched matrix products round differently


def test_generate_refuses_a_step_count_the_recipe_does_not_list(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--base", "digits-sd3", "--adapter", str(adapter_file), "--steps", "3"]
    assert main([*argv, "--prompt", "a two", "--out", str(tmp_path / "out")]) == 2
    assert "not made for 3 steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_nowhere_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--base", "/no/such/folder", "--recipe", "zoo:sdxl-turbo", "--prompt", "x"]
    assert main(argv) == 2
    assert "/no/such/folder is neither a folder here nor" in capsys.readouterr().err
