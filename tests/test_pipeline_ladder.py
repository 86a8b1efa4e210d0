"""Scale ladders (SwD) in real pipelines, against the loop of the paper written out."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe, Sampler
from fewstep.sampling import to_x0
from fewstep.schedulers import FewStepScheduler
from fewstep.schedulers.scale_ladder import ScaleLadder
from tests.tiny.families import FLUX, PIXART, QWEN_IMAGE, SANA, SD3, SD15, SDXL, WAN21, Z_IMAGE
from tests.tiny.family import TinyFamily
from tests.tiny.tasks import Call, arguments_of, trace

SIZES = (0.5, 0.625, 0.75, 1.0)
LATENT_SIZES = (8, 10, 12, 16)
LADDER = pytest.mark.parametrize("family", [SD15, SDXL, SD3, PIXART, SANA], ids=lambda f: f.name)


def ladder_recipe(family: TinyFamily, sizes: tuple[float, ...] = SIZES) -> FewStepRecipe:
    recipe = family.recipe()
    grids = (replace(recipe.grids[0], sizes=sizes),)
    return replace(recipe, grids=grids, sampler=Sampler(stochasticity=1.0))


def wrapped(family: TinyFamily, **kwargs: Any) -> FewStepPipeline:
    pipe = FewStepPipeline.wrap(family.build(), recipe=ladder_recipe(family, **kwargs))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def larger(x0: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(x0, (size, size), mode="bicubic", align_corners=False)


def predicted(recipe: FewStepRecipe, calls: list[Call]) -> list[Tensor]:
    levels = recipe.levels()
    return [
        to_x0(recipe.base.prediction, call.output[:, :4], call.sample, level)
        for call, level in zip(calls, levels, strict=False)
    ]


@LADDER
def test_each_sample_is_the_enlarged_prediction_noised_at_its_own_size(family: TinyFamily) -> None:
    pipe = wrapped(family)
    calls = trace(pipe.components[family.denoisers[0]])
    result = pipe(**family.arguments(1), seed=4)[0]
    levels, x0 = pipe.recipe.levels(), predicted(pipe.recipe, calls)
    generator = torch.Generator().manual_seed(4)
    noise = [torch.randn(1, 4, size, size, generator=generator) for size in LATENT_SIZES]
    assert [tuple(call.sample.shape) for call in calls] == [tuple(n.shape) for n in noise]
    torch.testing.assert_close(calls[0].sample, levels[0].sigma * noise[0])
    for i, (before, call) in enumerate(pairwise(calls)):
        assert before is not call
        enlarged = larger(x0[i], LATENT_SIZES[i + 1])
        expected = levels[i + 1].alpha * enlarged + levels[i + 1].sigma * noise[i + 1]
        torch.testing.assert_close(call.sample, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result, x0[-1], rtol=1e-4, atol=1e-4)


@LADDER
def test_the_picture_has_the_size_that_was_asked_for(family: TinyFamily) -> None:
    pipe = wrapped(family)
    arguments = {**family.arguments(1), "output_type": "pt"}
    assert pipe(**arguments, seed=4)[0].shape == (1, 3, 32, 32)
    arguments |= {"height": 64, "width": 32}
    assert pipe(**arguments, seed=4)[0].shape == (1, 3, 64, 32)


@LADDER
def test_a_picture_depends_on_its_seed_alone(family: TinyFamily) -> None:
    pipe = wrapped(family)
    both = pipe(**family.arguments(2), seed=[7, 8])[0]
    alone = pipe(**family.arguments(1), seed=7)[0]
    torch.testing.assert_close(alone, both[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(pipe(**family.arguments(2), seed=7)[0], both)


def test_a_step_count_of_another_size_is_followed_from_its_first_sample() -> None:
    """SD3 draws its noise before it tells the step count; the size is still the asked grid's."""
    recipe = ladder_recipe(SD3)
    whole = replace(SD3.recipe(timesteps=(1000.0, 625.0)).grids[0], sizes=(1.0, 1.0))
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=replace(recipe, grids=(whole, *recipe.grids)))
    calls = trace(pipe.components["transformer"])
    for steps in (4, 2, 4):
        pipe(**SD3.arguments(1), num_inference_steps=steps, seed=0)
    sizes = [call.sample.shape[-1] for call in calls]
    assert sizes == [*LATENT_SIZES, 16, 16, *LATENT_SIZES]


@pytest.mark.parametrize("family", [FLUX, QWEN_IMAGE, WAN21, Z_IMAGE], ids=lambda f: f.name)
def test_pipelines_whose_samples_cannot_grow_are_refused(family: TinyFamily) -> None:
    stock = family.build()
    with pytest.raises(PipelineError, match="samples grow from step to step, which .* cannot do"):
        FewStepPipeline.wrap(stock, recipe=ladder_recipe(family))
    assert not isinstance(stock.components["scheduler"], FewStepScheduler)


def test_image_to_image_cannot_grow_either() -> None:
    stock = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(SD3.build())
    with pytest.raises(PipelineError, match="StableDiffusion3Img2ImgPipeline cannot do"):
        FewStepPipeline.wrap(stock, recipe=ladder_recipe(SD3))


def test_latents_of_the_callers_own_have_no_first_size() -> None:
    pipe = wrapped(SD3)
    latents = torch.zeros(1, *SD3.latent_shape)
    with pytest.raises(PipelineError, match="latents were passed, but this recipe's first sample"):
        pipe(**arguments_of(pipe, SD3, latents=latents))


def test_a_bare_scheduler_that_was_told_no_size_says_so() -> None:
    scheduler = FewStepScheduler(ladder_recipe(SD3))
    with pytest.raises(PipelineError, match="this recipe's samples grow from step to step"):
        scheduler.step(torch.zeros(1, 4, 8, 8), 1000.0, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("full", "fraction", "expected"),
    [(128, 0.5, 64), (128, 0.625, 80), (128, 0.75, 96), (97, 1.0, 97), (97, 0.5, 48), (4, 0.1, 2)],
)
def test_sizes_are_even_but_for_the_finished_one(full: int, fraction: float, expected: int) -> None:
    ladder = ScaleLadder()
    ladder.start(full, full)
    assert ladder.size(fraction) == (expected, expected)
