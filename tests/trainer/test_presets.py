"""Every preset on a tiny random model of its class: three real steps, and the product obeyed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.pipeline import FewStepPipeline
from fewstep.trainer.backbones.latents import unpack
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.config import LoraConfig
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.generate import generate, student_speaker
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.parallel import Processes
from fewstep.trainer.presets import PRESETS
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.setup import assemble
from tests.trainer import backbone_cases as cases
from tests.trainer.backbone_cases import Case

SIZE_PX = 32
SEEDS = [11, 12]
OF_PRESET = {
    "image-4step": cases.SD3,
    "sd15-4step": cases.SD15,
    "sdxl-4step": cases.SDXL,
    "sd35-4step": cases.SD3,
    "flux-4step": cases.FLUX_DEV,
    "pixart-4step": cases.PIXART,
    "sana-4step": cases.SANA,
    "qwen-4step": cases.QWEN_IMAGE,
    "z-image-4step": cases.Z_IMAGE,
    "wan-4step": cases.WAN21,
}
RUNS = [*OF_PRESET.items(), ("sdxl-4step", cases.SDXL_V), ("wan-4step", cases.WAN22)]


def short(config: Any, out: Path) -> Any:
    """The preset with three steps, rank 2 and rates that move a random model."""
    method = config.method
    assert isinstance(method, WarmDmd2)
    match = dataclasses.replace(
        method.match, num_steps=2, critic_warmup=0, critic_updates=1, learning_rate=0.05
    )
    warm = dataclasses.replace(
        method.warm_start, num_steps=1, teacher_substeps=1, learning_rate=0.05
    )
    return dataclasses.replace(
        config,
        out=out / "student",
        method=WarmDmd2(warm_start=warm, match=match),
        lora=dataclasses.replace(config.lora, rank=2, alpha=2.0, critic_rank=2),
        batch_size=2,
        size_px=SIZE_PX,
        num_frames=5,
        max_sequence_length=0,
        precision="fp32",
        gradient_checkpointing=False,
        device="cpu",
        ema_decay=0.1,
    )


def trained(name: str, case: Case, out: Path) -> Run:
    preset = next(preset for preset in PRESETS if preset.name == name)
    backbone = wrap_pipeline(case.build())
    for part in backbone.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    book = PromptBook(("a", "b"), case.condition(), case.null_condition())
    run = assemble(short(preset.config, out), backbone, book, Processes())
    for _ in range(3):
        metrics = advance(run)
        assert all(value == value for value in metrics.values())  # no NaN
    assert run.is_done
    return run


def by_trainer(run: Run) -> Tensor:
    return generate(
        run.setting,
        run.frame.path,
        speaker=student_speaker(run.setting.route, Role.AVERAGE),
        guidance_scale=1.0,
        prompts=[0, 1],
        seeds=SEEDS,
    )


def by_pipeline(case: Case, adapter: Path) -> Tensor:
    pipe = FewStepPipeline.wrap(case.build(), adapter=adapter, probe=False)
    pipe.set_progress_bar_config(disable=True)
    null = case.null_condition().expand(2)
    arguments = case.arguments(case.condition(), null, 1.0)
    wanted = {k: v for k, v in arguments.items() if "negative" not in k and "scale" not in k}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    return pipe(
        **wanted, height=SIZE_PX, width=SIZE_PX, output_type="latent", generator=generators
    )[0]


@pytest.mark.parametrize(("name", "case"), RUNS, ids=[f"{n}-{c.name}" for n, c in RUNS])
def test_a_preset_trains_saves_and_is_obeyed(name: str, case: Case, tmp_path: Path) -> None:
    """Targets found, losses finite, adapter saved; the stock pipeline draws what was trained."""
    run = trained(name, case, tmp_path)
    run.export({})
    expected = by_trainer(run)
    found = by_pipeline(case, tmp_path / "student" / "adapter")
    if case.is_packed:
        found = unpack(found, *expected.shape[-2:])
    assert run.backbone.evaluations["critic"] > 0
    with torch.no_grad():
        for parameter in run.setting.cast.parameters(Role.AVERAGE):
            parameter.zero_()
    untrained = by_trainer(run)
    assert (untrained - expected).abs().max() > 1e-3 * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_presets_say_where_their_numbers_come_from() -> None:
    assert {preset.name for preset in PRESETS} == set(OF_PRESET)
    for preset in PRESETS:
        assert len(preset.source) > 20
        assert "not run" in preset.result


@pytest.mark.parametrize("kind", ["smaller", "full"])
def test_a_network_of_its_own_is_saved_as_a_component_with_its_recipe(
    kind: Any, tmp_path: Path
) -> None:
    """`from_pretrained` of the component, put into the base, wrapped with the recipe beside it."""
    from diffusers import SD3Transformer2DModel

    case = cases.SD3
    preset = next(preset for preset in PRESETS if preset.name == "sd35-4step")
    config = short(preset.config, tmp_path)
    config = dataclasses.replace(
        config,
        method=WarmDmd2(
            warm_start=TrajectoryConfig(num_steps=1, teacher_substeps=1),
            match=MatchConfig(num_steps=1, critic_updates=1, critic_warmup=0),
        ),
        lora=LoraConfig(rank=2, alpha=2.0, critic_rank=2, student=kind),
    )
    backbone = wrap_pipeline(case.build())
    book = PromptBook(("a", "b"), case.condition(), case.null_condition())
    run = assemble(config, backbone, book, Processes())
    while not run.is_done:
        advance(run)
    run.export({})
    expected = by_trainer(run)
    folder = tmp_path / "student" / "adapter" / "student"
    pipe: Any = case.build()
    pipe.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    pipe = FewStepPipeline.wrap(pipe, recipe=folder / "fewstep_recipe.json", probe=False)
    pipe.set_progress_bar_config(disable=True)
    null = case.null_condition().expand(2)
    arguments = case.arguments(case.condition(), null, 1.0)
    wanted = {k: v for k, v in arguments.items() if "negative" not in k and "scale" not in k}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    found = pipe(
        **wanted, height=SIZE_PX, width=SIZE_PX, output_type="latent", generator=generators
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    own: Any = backbone.denoiser
    blocks = len(pipe.transformer.transformer_blocks)
    assert blocks == (1 if kind == "smaller" else len(own.transformer_blocks))
