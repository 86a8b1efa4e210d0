"""torch.compile of the denoiser: one graph serves every step, every call and the adapter.

The graph is captured by Dynamo as for any backend; "eager" runs it without a compiler, which is
enough to see recompilation. Speed needs a GPU and is not measured here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Sampler
from tests.tiny.adapters import lora_file
from tests.tiny.families import FLUX, SD3, SD15, SDXL
from tests.tiny.family import TinyFamily

FAMILIES = pytest.mark.parametrize(
    "family",
    [SD15, SD3, pytest.param(SDXL, marks=pytest.mark.slow), FLUX],
    ids=lambda family: family.name,
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def draw(pipe: Any, family: TinyFamily, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**family.arguments(1), **{"seed": 0, **kwargs})[0]


@FAMILIES
def test_steps_and_calls_share_their_graphs(family: TinyFamily, tmp_path: Path) -> None:
    """The first step captures; three steps more, another seed and strength of noise do not."""
    file = lora_file(
        family,
        tmp_path / "a.safetensors",
        recipe=family.recipe(sampler=Sampler(stochasticity=1.0)),
    )
    expected = draw(FewStepPipeline.wrap(family.build(), adapter=file), family)
    pipe = FewStepPipeline.wrap(family.build(), adapter=file)
    pipe.components[family.denoisers[0]].compile(backend="eager")
    after_each: list[int] = []
    scheduler: Any = pipe.scheduler
    step = scheduler.step

    def count(*args: Any, **kwargs: Any) -> Any:
        after_each.append(graphs())
        return step(*args, **kwargs)

    scheduler.step = count
    torch.testing.assert_close(draw(pipe, family), expected, rtol=1e-4, atol=1e-5)
    draw(pipe, family, seed=5)
    draw(pipe, family)
    assert after_each[0] > 0
    assert after_each == [after_each[0]] * 12
    assert counters["recompiles"] == {}


def test_a_step_count_of_another_grid_needs_no_new_graph() -> None:
    two, four = SD15.recipe(timesteps=(999.0, 499.0)), SD15.recipe()
    recipe = replace(four, grids=(*two.grids, *four.grids))
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=recipe)
    pipe.components["unet"].compile(backend="eager")
    draw(pipe, SD15)
    captured = graphs()
    draw(pipe, SD15, num_inference_steps=2)
    assert graphs() == captured
