"""Several students in one product: what FewStepPipeline draws in one call is what was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import FewStepPipeline
from fewstep.adapters import read_header
from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3, build_sd15
from fewstep.errors import AdapterError
from fewstep.trainer import checkpoint
from fewstep.trainer.adapter import write_product
from fewstep.trainer.config import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
)
from fewstep.trainer.generate import generate, student_speaker
from fewstep.trainer.loop import train
from fewstep.trainer.methods.msd import Msd
from fewstep.trainer.methods.phased_dmd import PhasedDmd
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.run_state import restore_run
from fewstep.trainer.setup import build_run

PROMPTS = ["seven", "three", "7", "3"]
SEEDS = [11, 12, 13, 14]
FEW = MatchConfig(
    num_steps=1, learning_rate=0.05, critic_learning_rate=0.05, critic_updates=1, critic_warmup=2
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, build in (("sd3", build_sd3), ("sd15", build_sd15)):
        torch.manual_seed(0)
        build(build_autoencoder()).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def config_for(models: Path, kind: str, out: Path, method: Any) -> TrainConfig:
    return TrainConfig(
        model=str(models / kind),
        data=DataConfig(prompts=str(models / "prompts.txt")),
        out=out,
        batch_size=4,
        max_sequence_length=1 if kind == "sd3" else 0,
        guidance_scale=2.0,
        sample_every=0,
        ema_decay=0.5,
        grid=GridConfig(num_steps=3),
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=4, critic_rank=4, alpha=2.0),
        method=method,
        device="cpu",
    )


def trained(config: TrainConfig) -> tuple[Path, Run]:
    """What the run wrote, and the run as it ended."""
    result = train(config)
    assert result.adapter is not None
    run = build_run(config)
    found = checkpoint.latest(run.folder.checkpoints)
    assert found is not None
    restore_run(run, found)
    return result.adapter, run


def by_trainer(run: Run, role: Role = Role.AVERAGE) -> Tensor:
    return generate(
        run.setting,
        run.frame.path,
        speaker=student_speaker(run.setting.route, role),
        guidance_scale=1.0,
        prompts=list(range(len(PROMPTS))),
        seeds=SEEDS,
    )


def by_pipeline(pipe: Any, prompts: list[str], seeds: list[int]) -> Tensor:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=prompts, generator=generators, output_type="latent").images


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


KINDS = ["sd3", pytest.param("sd15", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_phase_experts_is_loaded_in_one_call(
    models: Path, tmp_path: Path, kind: str
) -> None:
    config = config_for(models, kind, tmp_path / "student", PhasedDmd(match=FEW))
    folder, run = trained(config)
    assert folder == config.out / "adapter"
    first, second = sorted(folder.iterdir())
    assert (first.name, second.name) == (
        "student-phase-0.safetensors",
        "student-phase-1.safetensors",
    )
    pipe = FewStepPipeline.from_pretrained(config.model, adapter=folder)
    found, expected = by_pipeline(pipe, PROMPTS, SEEDS), by_trainer(run)
    assert relative_error(found, expected) < 1e-5
    recipe = read_header(first).recipe()
    assert recipe is not None
    assert recipe == read_header(second).recipe()
    assert recipe.grids[0].experts == (0, 0, 1)
    # the experts differ, or any assignment would have done
    swapped = {"phase-0": second, "phase-1": first}
    wrong = FewStepPipeline.from_pretrained(config.model, adapter=swapped)
    assert relative_error(by_pipeline(wrong, PROMPTS, SEEDS), expected) > 1e-3
    # files of two moments are no pair: a run that dies between them leaves nothing that half works
    other = write_product(RunFolder(tmp_path / "later"), run.setting, run.frame, {}, 99)
    second.write_bytes((other / second.name).read_bytes())
    with pytest.raises(AdapterError, match="different recipes"):
        FewStepPipeline.from_pretrained(config.model, adapter=folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_students_routes_every_prompt_to_its_own(
    models: Path, tmp_path: Path, kind: str
) -> None:
    method = Msd(match=replace(FEW, num_steps=6))
    config = config_for(models, kind, tmp_path / "student", method)
    file, run = trained(config)
    assert file == config.out / "adapter" / "student.safetensors"
    recipe = read_header(file).recipe()
    assert recipe is not None
    assert [route.adapter for route in recipe.routes] == ["group-0", "group-1"]
    assert sorted(p for route in recipe.routes for p in route.prompts) == sorted(PROMPTS)
    pipe = FewStepPipeline.from_pretrained(config.model, adapter=file)
    expected = by_trainer(run)
    for prompt, seed, wanted in zip(PROMPTS, SEEDS, expected, strict=True):
        assert relative_error(by_pipeline(pipe, [prompt], [seed])[0], wanted) < 1e-5
    untrained = by_trainer(run, Role("nobody"))
    for mine, other in zip(expected, untrained, strict=True):
        assert relative_error(mine, other) > 1e-3
