"""Configs are checked, survive JSON, and every recipe and flag works on the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.errors import ConfigError
from fewstep.trainer.__main__ import main
from fewstep.trainer.config import DataConfig, GridConfig, LoraConfig, TrainConfig
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.recipes import RECIPES
from fewstep.trainer.setup import prompts_of


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = RECIPES[name].config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: LoraConfig(rank=0), "lora.rank must be >= 1, got 0"),
        (lambda: LoraConfig(rank=8, critic_rank=4), "lora.critic-rank must be >= 8, got 4"),
        (lambda: GridConfig(stochasticity=1.5), "grid.stochasticity must be 0 to 1, got 1.5"),
        (lambda: GridConfig(num_steps=0), "grid.num-steps must be >= 1, got 0"),
        (lambda: MatchConfig(tau_min=0.9, tau_max=0.5), "tau-min must be 0 to 0.5, got 0.9"),
        (lambda: TrajectoryConfig(learning_rate=0.0), "learning-rate must be above 0, got 0"),
        (lambda: TrainConfig(batch_size=10, accumulation=3), "cannot be cut into 3 equal parts"),
        (
            lambda: TrainConfig(
                method=WarmDmd2(
                    warm_start=TrajectoryConfig(num_steps=0), match=MatchConfig(num_steps=0)
                )
            ),
            "both stages have 0 steps",
        ),
    ],
)
def test_bad_settings_are_one_clear_sentence(change, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ConfigError, match=message) as caught:
        change()
    assert "\n" not in str(caught.value)


def test_a_wrong_type_in_config_json_is_refused() -> None:
    data = TrainConfig().to_dict()
    with pytest.raises(ConfigError, match="batch_size must be an integer"):
        TrainConfig.from_dict({**data, "batch_size": "64"})
    with pytest.raises(ConfigError, match="unknown key bath_size"):
        TrainConfig.from_dict({**data, "bath_size": 64})


def test_the_digest_follows_what_shapes_the_weights_only() -> None:
    config = TrainConfig()
    assert dataclasses.replace(config, out=Path("elsewhere")).digest() == config.digest()
    assert dataclasses.replace(config, device="cuda").digest() == config.digest()
    assert dataclasses.replace(config, seed=1).digest() != config.digest()


def test_another_model_needs_prompts() -> None:
    with pytest.raises(ConfigError, match="pass --data.prompts FILE"):
        prompts_of(TrainConfig(model="some/model"))


def test_an_empty_prompts_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no prompts"):
        prompts_of(TrainConfig(model="some/model", data=DataConfig(prompts=str(file))))


def test_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA" in shown
    for name in RECIPES:
        assert name[:12] in shown


def test_a_users_mistake_is_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fewstep.trainer", "digits-4step", "--model", str(tmp_path / "no"),
        "--data.prompts", str(tmp_path / "none.txt"), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "could not be loaded as a diffusers pipeline" in " ".join(done.stderr.split())


def test_an_impossible_override_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["digits-4step", "--lora.rank", "0"])
    assert caught.value.code == 2
    assert "lora.rank must be >= 1, got 0" in " ".join(capsys.readouterr().err.split())
