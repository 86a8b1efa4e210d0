"""The adapter of a run draws the same pictures in the trainer, our pipeline and stock diffusers."""

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
from fewstep.loading import load_stock_pipeline
from fewstep.noise import NoiseBatch
from fewstep.recipe_plan import plan_steps
from fewstep.sampling import to_x0
from fewstep.trainer.config import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
)
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.loop import train
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.roles import Role
from fewstep.trainer.run_state import restore_run
from fewstep.trainer.setup import build_run
from fewstep.trajectory import sample_trajectory

PROMPTS = ["seven", "three"]
SEEDS = [11, 12]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, build in (("sd3", build_sd3), ("sd15", build_sd15)):
        torch.manual_seed(0)
        build(build_autoencoder()).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def config_for(models: Path, kind: str, out: Path) -> TrainConfig:
    return TrainConfig(
        model=str(models / kind),
        data=DataConfig(prompts=str(models / "prompts.txt")),
        out=out,
        batch_size=2,
        max_sequence_length=1 if kind == "sd3" else 0,
        sample_every=1,
        ema_decay=0.5,
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=4, critic_rank=4, alpha=2.0),
        method=WarmDmd2(
            warm_start=TrajectoryConfig(num_steps=2, learning_rate=0.05, teacher_substeps=1),
            match=MatchConfig(num_steps=1, critic_updates=1, critic_warmup=1),
        ),
        device="cpu",
    )


@pytest.fixture(scope="module", params=["sd3", "sd15"])
def trained(request: pytest.FixtureRequest, models: Path, tmp_path_factory: Any) -> TrainConfig:
    config = config_for(models, request.param, tmp_path_factory.mktemp("run") / "student")
    config = replace(config, grid=GridConfig(num_steps=4, stochasticity=1.0))
    result = train(config)
    assert result.adapter is not None
    return config


def adapter_of(config: TrainConfig) -> Path:
    return config.out / "adapter" / "student.safetensors"


def by_trainer(config: TrainConfig) -> Tensor:
    from fewstep.trainer import checkpoint

    run = build_run(config)
    found = checkpoint.latest(run.folder.checkpoints)
    assert found is not None
    restore_run(run, found)
    return generate(
        run.setting,
        run.frame.path,
        speaker=one_speaker(Role.AVERAGE),
        guidance_scale=1.0,
        prompts=[0, 1],
        seeds=SEEDS,
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_fewstep_pipeline_draws_what_the_trainer_draws(trained: TrainConfig) -> None:
    pipe = FewStepPipeline.from_pretrained(trained.model, adapter=adapter_of(trained))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    latents = pipe(prompt=PROMPTS, generator=generators, output_type="latent").images
    expected = by_trainer(trained)
    assert relative_error(latents, expected) < 1e-5


def test_the_adapter_changes_the_picture(trained: TrainConfig) -> None:
    """Otherwise the other tests here would hold for a file that does nothing."""
    expected = by_trainer(trained)
    run = build_run(replace(trained, out=trained.out.parent / "fresh"))
    untouched = generate(
        run.setting,
        run.frame.path,
        speaker=one_speaker(Role.TEACHER),
        guidance_scale=1.0,
        prompts=[0, 1],
        seeds=SEEDS,
    )
    assert relative_error(expected, untouched) > 0.01


def test_stock_diffusers_with_our_grid_reproduces_our_picture(trained: TrainConfig) -> None:
    """Stock load_lora_weights, the recipe read from the file, and the one step function."""
    pipe: Any = load_stock_pipeline(trained.model)
    pipe.load_lora_weights(adapter_of(trained).parent, weight_name="student.safetensors")
    recipe = read_header(adapter_of(trained)).recipe()
    assert recipe is not None
    noise = NoiseBatch(SEEDS)

    def draw(_: float = 1.0) -> Tensor:
        return torch.from_numpy(noise.draw((16, 8, 8)))

    def denoise(sample: Tensor, level: Any) -> Tensor:
        timestep = torch.full((2,), level.timestep)
        if recipe.base.family == "sd3":
            sequence, _, pooled, _ = pipe.encode_prompt(
                PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=1
            )
            output = pipe.transformer(
                sample, encoder_hidden_states=sequence, pooled_projections=pooled, timestep=timestep
            ).sample
        else:
            sequence, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
            output = pipe.unet(sample, timestep, sequence).sample
        return to_x0(recipe.base.prediction, output, sample, level)

    levels = recipe.levels()
    with torch.no_grad():
        latents = sample_trajectory(
            denoise, levels[0].sigma * draw(), plan_steps(recipe), draw=draw
        )
    assert relative_error(latents, by_trainer(trained)) < 1e-5


def test_the_file_carries_the_grid_that_was_trained(trained: TrainConfig) -> None:
    recipe = read_header(adapter_of(trained)).recipe()
    assert recipe is not None
    is_flow = recipe.base.prediction == "flow"
    expected = (1000.0, 750.0, 500.0, 250.0) if is_flow else (999.0, 749.0, 499.0, 249.0)
    assert recipe.grid(4).timesteps == expected
    assert recipe.sampler.stochasticity == 1.0
    assert recipe.guidance.mode == "none"
    assert recipe.provenance.config_hash == trained.digest()
    assert recipe.provenance.objective == "warm-dmd2, 3 steps"


def test_the_run_folder_tells_the_whole_story(trained: TrainConfig) -> None:
    import json

    rows = [json.loads(r) for r in (trained.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "loss/trajectory" in rows[0]
    assert {"loss/dm", "loss/critic", "health/dm_cos", "health/dm_rel_gap"} <= set(rows[2])
    assert len(list((trained.out / "samples").glob("*.png"))) == 3
    config = json.loads((trained.out / "config.json").read_text())
    assert TrainConfig.from_dict(config) == trained
    assert (trained.out / "environment.json").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_bases_train(models: Path, tmp_path: Path, precision: Any) -> None:
    config = config_for(models, "sd3", tmp_path / "student")
    config = replace(config, precision=precision, sample_every=0, gradient_checkpointing=True)
    result = train(config)
    assert result.adapter is not None
    header = read_header(result.adapter)
    ups = [i for name, i in header.tensors.items() if name.endswith("lora_B.weight")]
    assert ups
    run = build_run(config)
    from fewstep.trainer import checkpoint

    found = checkpoint.latest(run.folder.checkpoints)
    assert found is not None
    assert all(torch.isfinite(t.float()).all() for t in found.tensors.values())
    name = "role/student/transformer_blocks.0.attn.to_q.lora_B.weight"
    assert found.tensors[name].abs().max() > 0
