"""What distillation looks at: prompts of every length, and held trajectories that stay unseen."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.export.families.registry import family_of
from fewstep.export.merging import MergedPipeline, set_precision
from fewstep.export.part import Part, Port
from fewstep.export.quantizing.distilling import distil
from fewstep.export.quantizing.lesson import HELD_SEED, Lesson, lesson_seed
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.schemes import Int4
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.session import Feeds
from tests.export import tiny_exports


class Affine(nn.Module):
    """Words times a weight, plus the first number of a table."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, words: Tensor, table: Tensor) -> Tensor:
        return words * self.weight + table[0]


def part(weight: float) -> Part:
    dims = ("batch_size", "length", "2")
    return Part(
        name="network",
        module=Affine(weight),
        inputs=(Port("words", dims), Port("table", ("rows",))),
        outputs=(Port("answer", dims),),
        config={},
        sizes={"batch_size": 2, "length": 3, "rows": 5},
    )


def lesson() -> Lesson:
    unused = cast(Any, None)  # only the two networks are asked
    return Lesson(unused, "network", part(1.0), part(0.8), (), unused)


def call(length: int, seed: int, table: float = 0.0) -> Feeds:
    words = np.random.default_rng(seed).normal(size=(1, length, 2)).astype(np.float32)
    return {"words": words, "table": np.full(5, table, np.float32)}


def test_calls_of_one_shape_go_side_by_side() -> None:
    one, two = call(3, seed=0), call(3, seed=1)
    words = torch.from_numpy(np.concatenate([one["words"], two["words"]]))
    wanted = (0.2 * words).square().mean() / words.square().mean()
    assert lesson().gap([one, two]).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("other", [call(7, seed=1), call(3, seed=1, table=0.5)])
def test_the_gap_of_calls_that_differ_in_shape_or_table_is_their_mean(other: Feeds) -> None:
    one, two, taught = call(3, seed=0), call(3, seed=2), lesson()
    wanted = (2 * taught.gap([one, two]) + taught.gap([other])) / 3
    found = taught.gap([one, other, two])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward()
    weight = taught.student.module.get_parameter("weight")
    assert weight.grad is not None
    assert weight.grad < 0  # towards the teacher's


def test_prompts_of_several_lengths_are_distilled() -> None:
    export = tiny_exports.BY_NAME["qwen-image"]
    pipe = export.pipeline()
    family = family_of(type(pipe).__name__)
    merged = MergedPipeline(pipe, export.recipe(), family, 0.0, "fp32")
    set_precision(merged, "fp32")
    folder = ExportFolder.open(tiny_exports.exported("qwen-image"))
    prompts = ("a cat", "a picture of two big blue dogs that run")
    plan = Plan(Int4(), (family.denoiser,), parse_skips(["none"]), prompts, threads=1)
    made = distil(folder, merged, plan, steps=1, progress=lambda _: None)
    assert 0 < made.after < made.before * 1.5


@pytest.mark.parametrize("pictures", [1, 8, 200])
def test_held_trajectories_are_never_trained_on(pictures: int) -> None:
    held = {(HELD_SEED + index) % 2**32 for index in range(pictures)}
    far = HELD_SEED // pictures  # here counting on would reach them
    for step in (0, 25, 500, 1250, 10_000, far - 1, far, far + 1, 3 * far):
        first = lesson_seed(step, pictures)
        drawn = {(first + index) % 2**32 for index in range(pictures)}
        assert not drawn & held
        assert max(drawn) < HELD_SEED
    assert len({lesson_seed(25 * turn, pictures) for turn in range(5000)}) == 5000
