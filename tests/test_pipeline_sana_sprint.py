"""SANA-Sprint: TrigFlow under our scheduler equals the stock pipeline with its SCMScheduler."""

import math
from typing import Any

import diffusers
import pytest
import torch

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Base, FewStepRecipe, Grid, Guidance, Sampler, Schedule
from tests.tiny.distilled import SANA_SPRINT
from tests.tiny.tasks import picture, task_pipeline

TOP = 1.5708
"""diffusers writes pi / 2 like this."""
GRIDS = {1: (TOP,), 2: (TOP, 1.3), 4: tuple(TOP * (1.0 - i / 4) for i in range(4))}


def sprint_recipe(guidance: float = 4.5) -> FewStepRecipe:
    """As published: re-noising, the scale a network input, two steps by default."""
    return FewStepRecipe(
        base=Base(
            family="sana-sprint",
            prediction="trigflow",
            schedule=Schedule(kind="trigflow", sigma_data=0.5),
        ),
        grids=tuple(
            Grid(timesteps=grid, sigmas=(*(min(1.0, math.sin(t)) for t in grid), 0.0))
            for grid in GRIDS.values()
        ),
        default_steps=2,
        sampler=Sampler(stochasticity=1.0),
        guidance=Guidance(mode="embedded", scale=guidance),
    )


def stock_picture(steps: int, **kwargs: Any) -> torch.Tensor:
    pipe: Any = SANA_SPRINT.build()
    middle = 1.3 if steps == 2 else None
    return pipe(
        **SANA_SPRINT.arguments(1),
        num_inference_steps=steps,
        intermediate_timesteps=middle,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(3),
        **kwargs,
    )[0]


@pytest.mark.parametrize("steps", GRIDS)
def test_the_picture_is_the_stock_pipelines_own(steps: int) -> None:
    pipe = FewStepPipeline.wrap(SANA_SPRINT.build(), recipe=sprint_recipe())
    ours = pipe(**SANA_SPRINT.arguments(1), num_inference_steps=steps, seed=3)[0]
    torch.testing.assert_close(ours, stock_picture(steps), rtol=1e-4, atol=1e-5)


def test_the_embedded_scale_is_the_recipes() -> None:
    pictures = [
        FewStepPipeline.wrap(SANA_SPRINT.build(), recipe=sprint_recipe(scale))(
            **SANA_SPRINT.arguments(1), seed=3
        )[0]
        for scale in (4.5, 2.0)
    ]
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-4)
    torch.testing.assert_close(pictures[0], stock_picture(2), rtol=1e-4, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch_mates() -> None:
    pipe = FewStepPipeline.wrap(SANA_SPRINT.build(), recipe=sprint_recipe())
    both = pipe(**SANA_SPRINT.arguments(2), seed=[3, 9])[0]
    alone = pipe(**SANA_SPRINT.arguments(1), seed=3)[0]
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 2), (0.85, 1), (0.1, 1)])
def test_image_to_image_begins_at_the_nearest_trained_angle(strength: float, steps: int) -> None:
    stock_pipe = task_pipeline(SANA_SPRINT, diffusers.SanaSprintImg2ImgPipeline)
    pipe = FewStepPipeline.wrap(stock_pipe, recipe=sprint_recipe())
    seen: list[float] = []
    transformer: Any = pipe.components["transformer"]
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    pipe(**SANA_SPRINT.arguments(1), image=picture(), strength=strength, seed=3)
    expected = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in GRIDS[2][-steps:]]
    assert seen == pytest.approx(expected, rel=1e-5)
