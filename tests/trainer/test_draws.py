"""Randomness by name and sample: what a draw depends on, and what it does not."""

import pytest
import torch

from fewstep.trainer.draws import Draws
from tests.trainer.analytic import exact_context, exact_setting

CPU = torch.device("cpu")


def draws(samples: range = range(12), *, seed: int = 0, step: int = 5, update: int = 1) -> Draws:
    return Draws(seed=seed, step=step, update=update, samples=samples, device=CPU)


def every_draw(part: Draws) -> list[torch.Tensor]:
    return [part.normal("a", (2, 3)), part.uniform("b"), part.integers("c", 7)]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_draw_what_the_whole_batch_draws(parts: int) -> None:
    whole = every_draw(draws())
    pieces = [every_draw(part) for part in draws().split(parts)]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([piece[index] for piece in pieces]), expected)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    alone = every_draw(draws(range(7, 8)))
    for one, many in zip(alone, every_draw(draws()), strict=True):
        assert torch.equal(one[0], many[7])


def test_shared_draws_are_equal_on_all_parts() -> None:
    parts = [draws(), *draws().split(4), draws(range(100, 104))]
    numbers = {part.shared_integer("exit", 0, 10**9) for part in parts}
    coins = {float(torch.rand((), generator=part.shared("coin"))) for part in parts}
    assert len(numbers) == len(coins) == 1


@pytest.mark.parametrize("other", [draws(seed=1), draws(step=6), draws(update=2)])
def test_seed_step_and_update_each_change_every_draw(other: Draws) -> None:
    for mine, theirs in zip(every_draw(draws()), every_draw(other), strict=True):
        assert not torch.equal(mine, theirs)
    assert draws().shared_integer("x", 0, 10**9) != other.shared_integer("x", 0, 10**9)


def test_names_are_independent() -> None:
    """No correlation, and asking for one leaves the other as it was."""
    many = draws(range(4000))
    first = many.normal("first", (2,)).flatten()
    before = many.normal("second", (2,))
    correlation = torch.corrcoef(torch.stack([first, before.flatten()]))[0, 1]
    assert abs(correlation) < 0.04  # 3.6 deviations
    many.normal("third", (5,))
    assert torch.equal(many.normal("second", (2,)), before)


def test_the_laws_are_right() -> None:
    many = draws(range(8000))
    normal = many.normal("normal", (4,))
    assert normal.mean().item() == pytest.approx(0.0, abs=0.02)
    assert normal.var().item() == pytest.approx(1.0, abs=0.03)
    uniform = many.uniform("uniform")
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.015)
    counts = torch.bincount(many.integers("integers", 5), minlength=5)
    assert len(counts) == 5
    assert counts.min() > 1450


def test_neighbours_in_one_draw_are_independent() -> None:
    uniform = draws(range(6000)).uniform("u")
    correlation = torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1]
    assert abs(correlation) < 0.05


def test_a_context_cut_into_parts_draws_the_same_prompts_noise_and_rollouts() -> None:
    setting = exact_setting()
    whole = exact_context(setting, count=8, with_grad=False)
    parts = [whole.part(draw) for draw in whole.draws.split(2)]
    assert torch.equal(torch.cat([part.prompt for part in parts]), whole.prompt)
    noise = torch.cat([part.normal("x") for part in parts])
    assert torch.equal(noise, whole.normal("x"))
