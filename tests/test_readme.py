"""What the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli.main import main
from fewstep.trainer.config import EvaluationConfig, TrainConfig
from fewstep.trainer.loop import train
from fewstep.trainer.methods.sfd import Sfd, TrajectoryConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADAPTER = "demo-out/adapter/digits-4step.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has been run, one training step long."""
    folder = tmp_path_factory.mktemp("readme")
    config = TrainConfig(
        out=folder / "run" / "digits-4step",
        max_sequence_length=1,
        batch_size=2,
        sample_every=0,
        method=Sfd(trajectory=TrajectoryConfig(num_steps=1)),
        evaluation=EvaluationConfig(every=0),
    )
    made = train(config).adapter
    assert made is not None
    (folder / ADAPTER).parent.mkdir(parents=True)
    made.rename(folder / ADAPTER)
    return folder


def test_the_python_block_draws_a_picture(folder: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "seven.png").stat().st_size > 100


def run(folder: Path, line: str) -> None:
    words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', line)]
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", *words], cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def commands(verb: str) -> list[str]:
    """The README's lines of one verb, comments cut off."""
    return re.findall(rf"^fewstep ({verb} .*?)(?:\s+#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("verb", ["inspect", "generate", "eval", "zoo search"])
def test_the_commands_run(folder: Path, verb: str) -> None:
    run(folder, commands(verb)[0])


def test_an_export_is_drawn(folder: Path) -> None:
    run(folder, f"{commands('export onnx')[0]} --force")  # its speed is not what is tested
    run(folder, commands("draw")[0])
    assert list((folder / "pictures").glob("*-seed7.png"))


@pytest.mark.slow
def test_a_recipe_without_training_in_three_commands(tmp_path: Path) -> None:
    for line in (commands("grid search")[0], commands("solver fit")[0], commands("generate")[1]):
        run(tmp_path, line)


def test_every_verb_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in set(re.findall(r"^fewstep ([a-z]+)", README, re.MULTILINE)):
        assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out


def test_the_first_screen_has_the_picture_and_both_commands() -> None:
    screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in screen
    assert "make test" in screen
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", screen)
    assert (ROOT / picture).stat().st_size > 10_000
