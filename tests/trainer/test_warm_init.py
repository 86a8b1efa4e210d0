"""A run that starts from a file draws what that file draws, before its first step."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.adapters.conversion.convert import convert_file
from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3
from fewstep.errors import ConfigError
from fewstep.trainer.config import DataConfig, EvaluationConfig, LoraConfig, TrainConfig
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.loop import train
from fewstep.trainer.methods.sfd import Sfd, TrajectoryConfig
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.setup import build_run

TARGETS = (r"attn\.to_q$", r"\.ff\.net\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits pipeline, prompts, and a trained adapter of rank 4."""
    folder = tmp_path_factory.mktemp("init")
    torch.manual_seed(0)
    build_sd3(build_autoencoder()).save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("seven\nthree\n", encoding="utf-8")
    train(config_for(folder, "first", steps=2))
    return folder


def config_for(folder: Path, name: str, *, steps: int = 1, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        model=str(folder / "sd3"),
        out=folder / name,
        method=Sfd(
            trajectory=TrajectoryConfig(num_steps=steps, learning_rate=0.1, teacher_substeps=1)
        ),
        data=DataConfig(prompts=str(folder / "prompts.txt")),
        batch_size=2,
        max_sequence_length=1,
        sample_every=0,
        ema_decay=0.1,
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=4, alpha=4.0, critic_rank=4, targets=TARGETS),
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def drawn(run: Run, role: Role) -> Tensor:
    return generate(
        run.setting,
        run.frame.path,
        speaker=one_speaker(role),
        guidance_scale=1.0,
        prompts=[0, 1],
        seeds=[1, 2],
    )


def adapter(folder: Path) -> Path:
    return folder / "first" / "adapter" / "first.safetensors"


@pytest.mark.parametrize("flavour", ["diffusers", "comfyui"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (6, 3.0)])
def test_a_run_starts_where_the_file_is(
    folder: Path, tmp_path: Path, flavour: Any, rank: int, alpha: float
) -> None:
    """Any naming, any rank of at least the file's, any alpha: the same pictures."""
    file = tmp_path / "turbo.safetensors"
    convert_file(adapter(folder), file, flavour, base=folder / "sd3")
    lora = LoraConfig(rank=rank, alpha=alpha, critic_rank=rank, targets=TARGETS)
    plain = build_run(config_for(folder, f"plain-{flavour}-{rank}", lora=lora))
    run = build_run(config_for(folder, f"from-{flavour}-{rank}", lora=lora, init=str(file)))
    first = build_run(config_for(folder, f"of-{flavour}-{rank}", init=str(adapter(folder))))
    expected = drawn(first, Role.STUDENT)
    assert (drawn(plain, Role.STUDENT) - expected).abs().max() > 1e-3
    for role in (Role.STUDENT, Role.AVERAGE):
        torch.testing.assert_close(drawn(run, role), expected, rtol=1e-4, atol=1e-4)


def test_a_smaller_rank_keeps_the_best_part(folder: Path) -> None:
    """By SVD: nearer to the file than a fresh student, at a quarter of its rank."""
    lora = LoraConfig(rank=1, alpha=1.0, critic_rank=1, targets=TARGETS)
    init = str(adapter(folder))
    whole = drawn(build_run(config_for(folder, "whole", init=init)), Role.STUDENT)
    part = drawn(build_run(config_for(folder, "part", lora=lora, init=init)), Role.STUDENT)
    fresh = drawn(build_run(config_for(folder, "fresh", lora=lora)), Role.STUDENT)
    assert (part - whole).norm() < 0.7 * (fresh - whole).norm()


def test_layers_that_would_be_lost_are_named(folder: Path) -> None:
    lora = LoraConfig(rank=4, alpha=4.0, critic_rank=4, targets=(r"attn\.to_q$",))
    with pytest.raises(ConfigError, match="layers that this run does not train, the first is"):
        build_run(config_for(folder, "lost", lora=lora, init=str(adapter(folder))))


def test_a_missing_file_is_a_sentence(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.safetensors does not exist"):
        build_run(config_for(folder, "missing", init="no.safetensors"))
