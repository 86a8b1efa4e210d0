"""Rollouts: the student's own trajectory, points beside it, and what is walked only once."""

import math

import pytest
import torch

from fewstep import sampling
from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.grids import (
    ANY_EXIT,
    LAST_EXIT,
    Exit,
    FixedGrid,
    RandomGrid,
    StudentPath,
    even_path,
)
from fewstep.trainer.components.rollouts import DataRollout, Either, OffPath, StudentRollout
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.components.trajectory import TeacherEnd
from fewstep.trainer.context import Setting
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.levels import position_of
from fewstep.trainer.roles import Role
from tests.trainer.analytic import (
    MEAN,
    SHAPE,
    VARIANCE,
    exact_context,
    exact_path,
    exact_setting,
)
from tests.trainer.oracles import Answer, gaussian_end, mixture_setting


def exact_student() -> Setting:
    """A student that answers where the exact ODE ends."""
    setting = exact_setting()
    setting.backbone.own_networks["student"] = Answer(gaussian_end(MEAN, VARIANCE), Flow())
    return setting


def test_a_rollout_is_what_sampling_does() -> None:
    """To the last step of a re-noising grid: same samples as the trainer's own sampler."""
    setting = mixture_setting()
    path = even_path(Flow(), 4)
    rolled = exact_context(setting, count=6).rolled(StudentRollout(FixedGrid(path), LAST_EXIT))
    assert rolled.start is not None
    sample = rolled.start
    with torch.no_grad():
        for now, following in zip(path.levels, path.levels[1:], strict=False):
            x0 = exact_context(setting, count=6).student_x0(sample, now, following)
            sample = sampling.step(sample, x0, now, following, None, following)
    torch.testing.assert_close(rolled.end, sample)
    assert torch.equal(rolled.end, rolled.x0)


def test_a_student_that_knows_the_end_gives_it_in_one_step() -> None:
    setting = exact_student()
    for index in range(3):
        rollout = StudentRollout(FixedGrid(exact_path(3)), Exit(index, index))
        rolled = exact_context(setting).rolled(rollout)
        assert rolled.start is not None
        if index == 0:
            expected = MEAN + math.sqrt(VARIANCE) * rolled.start
            torch.testing.assert_close(rolled.x0, expected, rtol=1e-5, atol=1e-5)
        assert rolled.x0.requires_grad
        assert not rolled.sample.requires_grad


def test_exits_of_one_trajectory_share_their_walk() -> None:
    """Three exits of one walk cost its longest prefix and one call each."""
    setting = mixture_setting()
    grid = FixedGrid(even_path(Flow(), 8))
    context = exact_context(setting, count=5)
    shared = [StudentRollout(grid, Exit(k, k), pick=f"exit {k}") for k in (5, 2, 7)]
    together = [context.rolled(rollout) for rollout in shared]
    assert setting.backbone.evaluations == {"student": 5 * (7 + 3)}
    for rolled, rollout in zip(together, shared, strict=True):
        alone = exact_context(setting, count=5).rolled(rollout)
        assert torch.equal(rolled.sample, alone.sample)
        assert torch.equal(rolled.x0, alone.x0)


def test_picks_see_different_steps_of_one_trajectory() -> None:
    setting = mixture_setting()
    law = RandomGrid(Flow(), least=6, most=8)
    exits = set[tuple[int, int]]()
    for step in range(40):
        context = exact_context(setting, count=1, step=step, with_grad=False)
        first, second = (context.rolled(StudentRollout(law, pick=name)) for name in ("a", "b"))
        assert first.path == second.path
        assert first.start is not None
        assert second.start is not None
        assert torch.equal(first.start, second.start)
        exits.add((first.index, second.index))
    assert len({a for a, _ in exits}) > 4
    assert any(a != b for a, b in exits)


def test_rollouts_of_other_names_are_other_trajectories() -> None:
    context = exact_context(mixture_setting(), count=4)
    grid = FixedGrid(even_path(Flow(), 2))
    one, other = (context.rolled(StudentRollout(grid, name=name)) for name in ("a", "b"))
    assert not torch.equal(one.x0, other.x0)


def test_a_data_rollout_starts_at_noised_data() -> None:
    context = exact_context(exact_setting(), count=32, uses_data=True)
    rolled = context.rolled(DataRollout(FixedGrid(exact_path(4)), Exit(2, 2)))
    assert rolled.start is not None
    expected = 0.5 * context.real.x0 + 0.5 * rolled.start
    torch.testing.assert_close(rolled.sample, expected)


def test_either_takes_both_by_its_share() -> None:
    setting = exact_setting()
    grid = FixedGrid(exact_path(1))
    either = Either(DataRollout(grid), StudentRollout(grid), 0.25)
    assert either.needs_data
    count = 0
    for step in range(200):
        context = exact_context(setting, count=1, step=step, with_grad=False, uses_data=True)
        whole = context.rolled(either)
        data = context.rolled(either.first)
        count += int(torch.equal(whole.sample, data.sample))
    assert count == pytest.approx(50, abs=20)


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
def test_a_point_beside_the_path_has_the_hand_formula(schedule: NoiseSchedule) -> None:
    """x' = x_t + (sigma' - sigma_t) v for flow; alpha' x0 + sigma' epsilon for any schedule."""
    setting = mixture_setting(schedule)
    around = StudentRollout(FixedGrid(even_path(schedule, 3)), Exit(1, 1))
    for step in range(5):
        context = exact_context(setting, count=4, step=step)
        off, on = context.rolled(OffPath(around)), context.rolled(around)
        x0, now, there = on.x0.detach(), on.now, off.now
        velocity = (on.sample - now.alpha * x0) / now.sigma
        torch.testing.assert_close(off.sample, there.alpha * x0 + there.sigma * velocity)
        if isinstance(schedule, Flow):
            v = (on.sample - x0) / now.sigma
            expected = on.sample + (there.sigma - now.sigma) * v
            torch.testing.assert_close(off.sample, expected, rtol=1e-5, atol=1e-5)
        assert isinstance(schedule, Flow) or there.timestep == round(there.timestep)
        assert 0.015 <= position_of(schedule, there) <= 0.985
        assert off.following.sigma == 0.0
        assert not off.sample.requires_grad
        assert off.x0.requires_grad


def test_on_a_straight_path_the_point_beside_it_is_on_it() -> None:
    """A student that always names the same x0 moves on a line, and so does its extrapolation."""
    setting = exact_setting()
    setting.backbone.own_networks["student"] = Answer(
        lambda sample, levels, labels: torch.full_like(sample, 0.7), Flow()
    )
    context = exact_context(setting, count=16)
    around = StudentRollout(FixedGrid(exact_path(4)), Exit(1, 1))
    off, on = context.rolled(OffPath(around)), context.rolled(around)
    assert on.start is not None
    sigma = off.now.sigma
    torch.testing.assert_close(off.sample, (1.0 - sigma) * 0.7 + sigma * on.start)


def test_a_point_beside_the_path_walks_nothing_twice() -> None:
    setting = mixture_setting()
    grid = FixedGrid(even_path(Flow(), 8))
    context = exact_context(setting, count=5)
    context.rolled(StudentRollout(grid, Exit(6, 6)))
    context.rolled(OffPath(StudentRollout(grid, Exit(4, 4), pick="off")))
    assert setting.backbone.evaluations == {"student": 5 * (6 + 1 + 1 + 1)}


def test_a_grid_of_the_sampler_is_walked_by_the_one_step_function() -> None:
    """TCD-like steps between: the walk re-noises with the named draws, and only there."""
    setting = mixture_setting()
    path = even_path(Flow(), 2, stochasticity=1.0)
    context = exact_context(setting, count=3)
    rolled = context.rolled(StudentRollout(FixedGrid(path), LAST_EXIT))
    assert rolled.start is not None
    first = exact_context(setting, count=3).student_x0(rolled.start, path.levels[0], path.levels[1])
    fresh = context.normal("rollout/noise/0")
    torch.testing.assert_close(rolled.sample, 0.5 * first.detach() + 0.5 * fresh)


def test_generated_samples_are_a_rollout_from_the_same_noise() -> None:
    setting = exact_student()
    latents = generate(
        setting,
        exact_path(1),
        speaker=one_speaker(Role.STUDENT),
        guidance_scale=1.0,
        prompts=[0] * 300,
        seeds=range(300),
    )
    assert tuple(latents.shape) == (300, *SHAPE)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert latents.var().item() == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize(
    ("delay", "ramp", "expected"),
    [
        (0.0, 0.0, [3.0, 3.0, 3.0, 3.0, 3.0]),
        (0.5, 0.0, [0.0, 0.0, 3.0, 3.0, 3.0]),
        (0.0, 0.5, [0.0, 1.5, 3.0, 3.0, 3.0]),
        (0.25, 0.5, [0.0, 0.0, 1.5, 3.0, 3.0]),
    ],
)
def test_weights_wait_and_rise(delay: float, ramp: float, expected: list[float]) -> None:
    path = StudentPath(exact_path(1).levels, Flow(), 0.0)
    term = TeacherEnd(StudentRollout(FixedGrid(path), ANY_EXIT), 1, 1.0)
    weighted = Weighted(term, 3.0, delay, ramp)
    assert [weighted.weight_at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(expected)
