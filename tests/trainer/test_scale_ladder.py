"""Samples that grow: training rolls out at the sizes, and by the steps, that inference takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import FewStepPipeline
from fewstep.adapters import read_header
from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, Level
from fewstep.trainer.adapter import product_file
from fewstep.trainer.components.grids import (
    LAST_EXIT,
    Exit,
    FixedGrid,
    StudentPath,
    even_path,
)
from fewstep.trainer.components.rollouts import DataRollout, StudentRollout
from fewstep.trainer.components.sizes import enlarged, reduced, shape_at
from fewstep.trainer.config import EvaluationConfig, GridConfig, LoraConfig
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.data.latent_book import LatentBook, LatentBucket
from fewstep.trainer.draws import Draws
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.adversarial import GanConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.swd import Swd
from fewstep.trainer.recipes import on_digits
from fewstep.trainer.roles import Role
from fewstep.trainer.setup import build_run, model_source
from fewstep.trajectory import plain_steps, sample_trajectory
from tests.trainer.analytic import exact_book, exact_setting
from tests.trainer.watched import WatchedBackbone

SIZES = (0.5, 0.75, 1.0)
LATENTS = (4, 6, 8)
SHAPE = (2, 8, 8)


def ladder() -> StudentPath:
    return replace(even_path(Flow(3.0), 3, shift=3.0, stochasticity=1.0), sizes=SIZES)


def context_of(*, uses_data: bool = False) -> StepContext:
    backbone = WatchedBackbone(SHAPE)
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(8, *SHAPE, generator=generator)
    latents = LatentBook((LatentBucket((x0,), torch.zeros(8, dtype=torch.long)),))
    plain = exact_setting()
    setting = Setting(backbone, plain.cast, exact_book(backbone), latents, (SHAPE,), plain.route)
    return StepContext(
        setting,
        Draws(0, 0, 0, range(4), torch.device("cpu")),
        progress=0.0,
        expert=None,
        with_grad=False,
        uses_data=uses_data,
    )


def test_sizes_are_the_schedulers() -> None:
    assert shape_at((16, 8, 8), 0.5) == (16, 4, 4)
    assert shape_at((16, 8, 8), 2 / 3) == (16, 6, 6)
    assert shape_at((4, 128, 96), 0.625) == (4, 80, 60)
    assert shape_at((4, 97, 97), 1.0) == (4, 97, 97)


def test_enlarging_is_bicubic_and_reducing_takes_means() -> None:
    x0 = torch.randn(1, 2, 4, 4)
    expected = torch.nn.functional.interpolate(x0, (8, 8), mode="bicubic", align_corners=False)
    assert torch.equal(enlarged(x0, (2, 8, 8)), expected)
    small = reduced(x0, (2, 2, 2))
    assert small[0, 0, 0, 0].item() == pytest.approx(x0[0, 0, :2, :2].mean().item())
    assert reduced(x0, (2, 4, 4)) is x0
    constant = torch.full((1, 1, 4, 4), 1.5)
    torch.testing.assert_close(enlarged(constant, (1, 6, 6)), torch.full((1, 1, 6, 6), 1.5))


def test_a_students_rollout_is_the_reference_trajectory() -> None:
    """`sample_trajectory` with the planned sizes and the same noise."""
    context, path = context_of(), ladder()
    draws = [context.normal("rollout/noise", SIZES[0])]
    draws += [context.normal(f"rollout/noise/{i}", SIZES[i + 1]) for i in range(2)]
    assert [d.shape[-1] for d in draws] == list(LATENTS)
    stream = iter(draws)
    first = path.levels[0].sigma * next(stream)
    seen: list[int] = []

    def denoise(sample: Tensor, level: Level) -> Tensor:
        seen.append(sample.shape[-1])
        return context.backbone.x0(Role.STUDENT, sample, context.levels(level), context.condition)

    steps = [
        replace(step, size=path.size(i), following_size=path.size(i + 1))
        for i, step in enumerate(plain_steps(path.levels, path.schedule, 1.0))
    ]
    expected = sample_trajectory(
        denoise,
        first,
        steps,
        draw=lambda size: next(stream),
        resize=lambda x0, size: enlarged(x0, shape_at(SHAPE, size)),
    )
    rolled = context.rolled(StudentRollout(FixedGrid(path), LAST_EXIT))
    assert seen == list(LATENTS)
    torch.testing.assert_close(rolled.end, expected, rtol=0, atol=0)
    assert rolled.start is not None
    assert rolled.start.shape[-1] == 4


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pictures_are_as_blurred_as_the_students_own_would_be(index: int) -> None:
    context, path = context_of(uses_data=True), ladder()
    rolled = context.rolled(DataRollout(FixedGrid(path), Exit(index, index)))
    before = LATENTS[max(0, index - 1)]
    x0 = torch.nn.functional.interpolate(context.real.x0, before, mode="area")
    if before != LATENTS[index]:
        x0 = torch.nn.functional.interpolate(x0, LATENTS[index], mode="bicubic")
    noise = context.normal("data/noise", SIZES[index])
    level = path.levels[index]
    torch.testing.assert_close(rolled.sample, level.alpha * x0 + level.sigma * noise)
    assert rolled.x0.shape[-1] == LATENTS[index]
    assert rolled.end.shape[-1] == LATENTS[min(2, index + 1)]


def test_without_sizes_nothing_changes() -> None:
    context = context_of(uses_data=True)
    path = replace(ladder(), sizes=())
    rolled = context.rolled(DataRollout(FixedGrid(path), Exit(1, 1)))
    level = path.levels[1]
    expected = level.alpha * context.real.x0 + level.sigma * context.normal("data/noise")
    torch.testing.assert_close(rolled.sample, expected, rtol=0, atol=0)
    assert [path.size(i) for i in range(4)] == [1.0] * 4


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"sizes": (0.5, 1.0), "num_steps": 4}, "grid.sizes has 2 values and grid.num-steps is 4"),
        ({"sizes": (1.0, 0.5), "num_steps": 2}, "wanted shares above 0 that rise to 1"),
        ({"sizes": (0.5, 1.0), "num_steps": 2}, "grid.stochasticity is 0; a sample can only grow"),
    ],
)
def test_ladders_that_cannot_be_climbed_are_refused(grid: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridConfig(**grid)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("steps", "sizes"), [(1, (1.0,)), (2, (0.5, 1.0)), (3, SIZES)])
def test_the_named_recipe_climbs_evenly_from_its_smallest_size(
    steps: int, sizes: tuple[float, ...]
) -> None:
    grid = Swd(smallest=0.5).grid(GridConfig(num_steps=steps))
    assert grid.sizes == pytest.approx(sizes)
    assert grid.stochasticity == 1.0


@pytest.mark.parametrize(
    "model", ["digits-sd3", pytest.param("digits-sd15", marks=pytest.mark.slow)]
)
def test_the_pipeline_draws_what_the_trainer_draws(model: str, tmp_path: Path) -> None:
    config = replace(on_digits(quick_swd(), num_steps=4, model=model), out=tmp_path / "student")
    config = replace(
        config,
        batch_size=2,
        sample_every=0,
        ema_decay=0.5,
        device="cpu",
        evaluation=EvaluationConfig(every=0),
        lora=LoraConfig(rank=2, alpha=2.0, critic_rank=2),
    )
    run = build_run(config)
    while not run.is_done:
        advance(run)
    run.export({})
    adapter = product_file(config)
    recipe = read_header(adapter).recipe()
    assert recipe is not None
    assert recipe.grid(4).sizes == pytest.approx((0.5, 2 / 3, 5 / 6, 1.0))
    pipe = FewStepPipeline.from_pretrained(model_source(model), adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (11, 12)]
    prompts = list(run.setting.book.prompts[:2])
    latents = pipe(prompt=prompts, generator=generators, output_type="latent").images
    expected = run.sample([0, 1], 11)
    assert expected.shape[-1] == 8
    assert float((latents - expected).norm() / expected.norm()) < 1e-5


def quick_swd() -> Swd:
    match = MatchConfig(num_steps=2, learning_rate=0.02, critic_updates=1, critic_warmup=1)
    return Swd(match=match, smallest=0.5, gan=GanConfig(features="teacher", width=8))
