"""A run that was stopped, killed or continued equals one that never stopped, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3
from fewstep.errors import CheckpointError
from fewstep.trainer import checkpoint
from fewstep.trainer.config import DataConfig, EvaluationConfig, LoraConfig, TrainConfig
from fewstep.trainer.loop import advance, train
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.run_state import save_run
from fewstep.trainer.setup import build_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits pipeline on disk, and a prompts file beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_sd3(build_autoencoder()).save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("seven\nthree\n\n", encoding="utf-8")
    return folder


def config_for(model: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model / "sd3"),
        data=DataConfig(prompts=str(model / "prompts.txt")),
        out=out,
        batch_size=4,
        accumulation=2,
        max_sequence_length=1,
        checkpoint_every=1,
        sample_every=0,
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=2, critic_rank=2, alpha=2.0),
        method=WarmDmd2(
            warm_start=TrajectoryConfig(num_steps=2, teacher_substeps=2),
            match=MatchConfig(num_steps=3, critic_updates=1, critic_warmup=2, ida=0.99),
        ),
        device="cpu",
    )


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None
    return dict(found.tensors)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "student"
    train(config_for(model, out))
    return out


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model: Path, uninterrupted: Path, tmp_path: Path, stop_after: int
) -> None:
    """Stops in the first stage, on the seam and in the second stage."""
    config = config_for(model, tmp_path / "student")
    run = build_run(config)
    for _ in range(stop_after):
        advance(run)
    save_run(run)
    del run
    train(config)
    mine, theirs = final_tensors(config.out), final_tensors(uninterrupted)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    product = "adapter/student.safetensors"
    assert (config.out / product).read_bytes() == (uninterrupted / product).read_bytes()


def test_training_changes_the_adapters(uninterrupted: Path) -> None:
    tensors = final_tensors(uninterrupted)
    for role in ("student", "critic", "average"):
        ups = [v for k, v in tensors.items() if k.startswith(f"role/{role}/") and "lora_B" in k]
        assert ups
        assert max(float(v.abs().max()) for v in ups) > 0.0


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """kill -9 in the middle; the same command finishes with the same bits."""
    config = config_for(model, tmp_path / "student")
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from fewstep.trainer.config import TrainConfig\n"
        "from fewstep.trainer.loop import train\n"
        "train(TrainConfig.from_dict(json.loads(sys.argv[1])))\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(script), json.dumps(config.to_dict())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while checkpoint.latest(config.out / "checkpoints") is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    train(config)
    for name, tensor in final_tensors(uninterrupted).items():
        assert torch.equal(final_tensors(config.out)[name], tensor), name


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a child process")
def test_ctrl_c_saves_and_exits_with_130(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    command = [
        sys.executable,
        "-m",
        "fewstep.trainer",
        "digits-4step",
        "--model",
        str(model / "sd3"),
        "--data.prompts",
        str(model / "prompts.txt"),
        "--out",
        str(out),
        "--batch-size",
        "2",
        "--evaluation.every",
        "0",
        "--quiet",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "run the same command to go on" in " ".join(errors.split())
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert found.step == len(lines)


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    good = checkpoint.Checkpoint(1, {"a": torch.ones(2)}, {"best": None})
    checkpoint.save(tmp_path, good)
    (tmp_path / ".tmp-0000002").mkdir()
    (tmp_path / ".tmp-0000002" / "tensors.safetensors").write_bytes(b"half")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {"a": torch.ones(2)}, {}))
    (folder / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="delete that folder"):
        checkpoint.latest(tmp_path)


def test_other_settings_in_the_same_folder_are_refused(model: Path, uninterrupted: Path) -> None:
    config = replace(config_for(model, uninterrupted), guidance_scale=3.0)
    with pytest.raises(CheckpointError, match="guidance_scale was 1.2, now 3.0"):
        train(config)
