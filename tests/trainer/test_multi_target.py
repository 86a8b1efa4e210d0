"""One adapter for several step counts: its recipe has every grid, and the pipeline samples each."""

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
from fewstep.errors import RecipeError
from fewstep.recipe import FewStepRecipe
from fewstep.trainer import checkpoint
from fewstep.trainer.components.grids import even_path
from fewstep.trainer.components.pairs import TeacherPairs
from fewstep.trainer.config import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
)
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.loop import train
from fewstep.trainer.methods.cdm import Cdm, RandomGridConfig
from fewstep.trainer.methods.dmd import Dmd, PairsConfig
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.recipes import on_digits
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_state import restore_run
from fewstep.trainer.setup import build_run

PROMPTS = ["seven", "three"]
SEEDS = [11, 12]
COUNTS = (1, 2, 4, 8)
FEW = MatchConfig(num_steps=2, critic_updates=1, critic_warmup=1, learning_rate=0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, build in (("sd3", build_sd3), ("sd15", build_sd15)):
        torch.manual_seed(0)
        build(build_autoencoder()).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def config_for(models: Path, kind: str, out: Path, method: Method, grid: GridConfig) -> TrainConfig:
    return TrainConfig(
        model=str(models / kind),
        data=DataConfig(prompts=str(models / "prompts.txt")),
        out=out,
        batch_size=2,
        max_sequence_length=1 if kind == "sd3" else 0,
        guidance_scale=2.0 if isinstance(method, Cdm) else 1.0,
        sample_every=0,
        checkpoint_every=1,
        ema_decay=0.5,
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=2, critic_rank=2, alpha=2.0),
        method=method,  # pyright: ignore[reportArgumentType]
        grid=grid,
        device="cpu",
    )


def trained(config: TrainConfig) -> tuple[Run, Path]:
    """The run after its last step, and its product."""
    runs: list[Run] = []
    result = train(config, lambda run, metrics: runs.append(run))
    assert result.adapter is not None
    return runs[-1], result.adapter


def recipe_of(adapter: Path) -> FewStepRecipe:
    recipe = read_header(adapter).recipe()
    assert recipe is not None
    return recipe


def by_trainer(run: Run, num_steps: int) -> Tensor:
    path = even_path(run.frame.schedule, num_steps, shift=run.config.grid.shift)
    return generate(
        run.setting,
        path,
        speaker=one_speaker(Role.AVERAGE),
        guidance_scale=1.0,
        prompts=[0, 1],
        seeds=SEEDS,
    )


def by_pipeline(pipe: Any, num_steps: int) -> Tensor:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    return pipe(
        prompt=PROMPTS, num_inference_steps=num_steps, generator=generators, output_type="latent"
    ).images


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_an_adapter_for_several_counts_is_sampled_at_each(
    models: Path, tmp_path: Path, kind: str
) -> None:
    grid = GridConfig(num_steps=4, also_steps=(1, 2, 8), shift=3.0 if kind == "sd3" else 1.0)
    method = Dmd2(match=replace(FEW, exit="last"))
    run, adapter = trained(config_for(models, kind, tmp_path / "student", method, grid))
    recipe = recipe_of(adapter)
    assert tuple(grid.num_steps for grid in recipe.grids) == COUNTS
    assert recipe.default_steps == 4
    assert recipe.steps == "strict"
    pipe = FewStepPipeline.from_pretrained(run.config.model, adapter=adapter)
    for count in COUNTS:
        assert relative_error(by_pipeline(pipe, count), by_trainer(run, count)) < 1e-5
    with pytest.raises(RecipeError, match="not made for 3 steps; use 1, 2, 4, 8"):
        by_pipeline(pipe, 3)


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_cdm_is_sampled_at_any_count(models: Path, tmp_path: Path, kind: str) -> None:
    """Counts that no recipe lists get the even grid, shifted as the run's grids are."""
    method = Cdm(match=replace(FEW, ida=0.999), random=RandomGridConfig(most=3))
    shift = 3.0 if kind == "sd3" else 1.0
    grid = method.grid(GridConfig(num_steps=4, shift=shift))
    run, adapter = trained(config_for(models, kind, tmp_path / "student", method, grid))
    recipe = recipe_of(adapter)
    assert tuple(grid.num_steps for grid in recipe.grids) == COUNTS
    assert recipe.steps == "any"
    pipe = FewStepPipeline.from_pretrained(run.config.model, adapter=adapter)
    for count in (1, 3, 5, 8):
        assert relative_error(by_pipeline(pipe, count), by_trainer(run, count)) < 1e-5


def test_a_run_with_pairs_continues_where_it_stopped(models: Path, tmp_path: Path) -> None:
    """Pairs are made again, the same, and the budget is not charged a second time."""
    method = Dmd(match=FEW, pairs=PairsConfig(count=4, teacher_steps=2))
    config = config_for(models, "sd3", tmp_path / "whole", method, GridConfig(num_steps=1))
    whole, _ = trained(config)
    again = build_run(config)
    found = checkpoint.latest(again.folder.checkpoints)
    assert found is not None
    restore_run(again, found)
    assert again.evaluations == whole.evaluations
    assert whole.backbone.evaluations["teacher"] == 4 * 2 + 2 * 2
    first = whole.setting.cast.tensors(Role.AVERAGE)
    for name, tensor in again.setting.cast.tensors(Role.AVERAGE).items():
        assert torch.equal(tensor, first[name])
    made = [one.stages[0].preparations[0] for one in (whole, again)]
    assert all(isinstance(pairs, TeacherPairs) for pairs in made)
    assert torch.equal(made[0].all.x0, made[1].all.x0)  # pyright: ignore


def test_the_named_recipe_of_cdm_lists_the_usual_counts() -> None:
    for model in ("digits-sd3", "digits-sd15"):
        for steps in COUNTS:
            assert on_digits(Cdm(), num_steps=steps, model=model).grid.all_steps == COUNTS
