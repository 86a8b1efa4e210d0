"""Terms with a teacher's answer as target: nothing to learn for an exact student, closed forms."""

import math

import pytest
import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, Vp
from fewstep.trainer.components.anchors import FirstStepAnchor, SegmentGuide, x0_towards
from fewstep.trainer.components.grids import LAST_EXIT, Exit, FixedGrid, even_path
from fewstep.trainer.components.moments import MomentGuard, moment_divergence
from fewstep.trainer.components.pairs import PairRegression, TeacherPairs
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.terms import Term
from fewstep.trainer.context import Setting
from fewstep.trainer.levels import Levels, level_at, levels_at, positions_of
from fewstep.trainer.roles import Role
from tests.trainer.analytic import (
    MEAN,
    VARIANCE,
    exact_context,
    exact_path,
    exact_setting,
)
from tests.trainer.oracles import Answer, gaussian_end, mixture_setting

DEVIATION = math.sqrt(VARIANCE)
FIRST = StudentRollout(FixedGrid(exact_path(4)), Exit(0, 0))
ONE_STEP = StudentRollout(FixedGrid(exact_path(1)))


def exact_student() -> Setting:
    setting = exact_setting()
    setting.backbone.own_networks["student"] = Answer(gaussian_end(MEAN, VARIANCE), Flow())
    return setting


def deviation_at(level: Level) -> float:
    return math.sqrt(level.alpha**2 * VARIANCE + level.sigma**2)


def loss_of(term: Term, setting: Setting, count: int = 64, step: int = 0) -> float:
    return term.loss(exact_context(setting, count=count, step=step))[0].item()


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
def test_the_x0_towards_a_sample_steps_there(schedule: NoiseSchedule) -> None:
    now, there = even_path(schedule, 4).levels[0], even_path(schedule, 7).levels[3]
    sample, reached = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x0 = x0_towards(sample, reached, now, there)
    stepped = sampling.step(sample, x0, now, there, None, there)
    torch.testing.assert_close(stepped, reached)


def anchor_student(anchor: Level) -> Answer:
    """Answers the x0 whose step from pure noise meets the exact ODE at `anchor`."""
    slope = (deviation_at(anchor) - anchor.sigma) / anchor.alpha

    def formula(sample: Tensor, levels: Levels, labels: Tensor) -> Tensor:
        return MEAN + slope * sample

    return Answer(formula, Flow())


def test_a_first_step_onto_the_teachers_path_has_no_anchor_loss() -> None:
    path = exact_path(600)
    setting = exact_setting()
    setting.backbone.own_networks["student"] = anchor_student(path.levels[150])
    term = FirstStepAnchor(FIRST, path, 150, 1.0)
    assert loss_of(term, setting) < 1e-5


def test_the_anchor_loss_is_the_velocitys_squared_error() -> None:
    """For flow: v_student - (x_1 - x_k) / (1 - sigma_k), with x_k the teacher's own k steps."""
    setting, path = exact_setting(), exact_path(8)
    context = exact_context(setting)
    rolled = context.rolled(FIRST)
    sample = rolled.sample
    for now, following in zip(path.levels[:3], path.levels[1:4], strict=True):
        x0 = context.backbone.x0(Role.TEACHER, sample, context.levels(now), context.condition)
        sample = sampling.step(sample, x0, now, following, None, following)
    velocity = (rolled.sample - rolled.x0) / 1.0
    expected = (velocity - (rolled.sample - sample) / (1.0 - path.levels[3].sigma)).square().mean()
    loss, metrics = FirstStepAnchor(FIRST, path, 3, 1.0).loss(context)
    torch.testing.assert_close(loss, expected)
    assert metrics["loss/anchor"] == pytest.approx(expected.item())


def test_one_teacher_step_is_no_anchor_at_all() -> None:
    """From pure noise the teacher's first step is the untrained student's: nothing to learn."""
    assert loss_of(FirstStepAnchor(FIRST, exact_path(4), 1, 1.0), exact_setting()) < 1e-10
    assert loss_of(FirstStepAnchor(FIRST, exact_path(4), 2, 1.0), exact_setting()) > 1e-3


def test_an_anchor_follows_guidance() -> None:
    setting = mixture_setting()
    path = even_path(Flow(), 6)
    rollout = StudentRollout(FixedGrid(even_path(Flow(), 2)), Exit(0, 0))
    FirstStepAnchor(rollout, path, 2, 3.0).loss(exact_context(setting, count=4))
    assert setting.backbone.evaluations == {"student": 4, "teacher": 4 * 2 * 2}


def test_an_exact_student_has_no_segment_loss() -> None:
    """If the teacher walks the ODE finely, both ways end at the same x0."""
    for step in range(4):
        assert loss_of(SegmentGuide(ONE_STEP, 1.0, 400), exact_student(), step=step) < 1e-5


@pytest.mark.parametrize("step", range(4))
def test_the_segment_loss_has_the_closed_form_of_one_teacher_step(step: int) -> None:
    """From pure noise one teacher step reaches alpha_u m + sigma_u z, where the exact student adds

    deviation / deviation_u * sigma_u z, against deviation * z directly.
    """
    setting = exact_student()
    context = exact_context(setting, step=step)
    u = float(torch.rand((), generator=context.draws.shared("segment")))
    rolled = context.rolled(ONE_STEP)
    assert rolled.start is not None
    middle = level_at(Flow(), u)
    target = MEAN + DEVIATION * middle.sigma / deviation_at(middle) * rolled.start
    direct = MEAN + DEVIATION * rolled.start
    error = (direct - target).square().mean(dim=(1, 2, 3))
    length = (target - rolled.start).square().mean(dim=(1, 2, 3))
    loss, _ = SegmentGuide(ONE_STEP, 1.0).loss(context)
    torch.testing.assert_close(loss, (error / length).mean(), rtol=1e-4, atol=1e-6)


def test_segments_are_cut_inside_the_step_and_on_integers_of_a_table() -> None:
    """The student is asked between its step's ends; the gradient is only that of the whole step."""
    setting = mixture_setting(Vp())
    rollout = StudentRollout(FixedGrid(even_path(Vp(), 4)), Exit(1, 1))
    asked: list[float] = []
    student = setting.backbone.own_networks["student"]
    assert isinstance(student, Answer)
    inner = student.formula

    def watched(sample: Tensor, levels: Levels, labels: Tensor) -> Tensor:
        asked.append(999.0 * positions_of(Vp(), levels)[0].item())
        return inner(sample, levels, labels)

    student.formula = watched
    context = exact_context(setting, count=2)
    loss, _ = SegmentGuide(rollout, 1.0).loss(context)
    assert asked[:2] == [999.0, 749.0]
    assert 499.0 <= asked[2] <= 749.0
    assert asked[2] == pytest.approx(round(asked[2]), abs=1e-6)
    loss.backward()
    assert student.offset.grad is not None


def pairs_of(setting: Setting, count: int = 12, steps: int = 500) -> TeacherPairs:
    pairs = TeacherPairs(count, exact_path(steps), 1.0)
    pairs.prepare(setting)
    return pairs


def test_pairs_are_the_end_of_the_teachers_ode() -> None:
    pairs = pairs_of(exact_setting()).all
    torch.testing.assert_close(pairs.x0, MEAN + DEVIATION * pairs.noise, rtol=0.01, atol=0.01)
    assert pairs.noise.var().item() == pytest.approx(1.0, abs=0.4)


def test_an_exact_student_has_no_pair_loss_and_the_teacher_has_the_variance() -> None:
    """One step of the untrained student is the mean, so its squared error is the pairs' spread."""
    setting = exact_student()
    pairs = pairs_of(setting)
    term = PairRegression(pairs, exact_path(1))
    assert loss_of(term, setting) < 1e-4
    untrained = loss_of(term, exact_setting(), count=400)
    spread = (pairs.all.x0 - MEAN).square().mean().item()
    assert untrained == pytest.approx(spread, rel=0.1)


def test_pairs_spread_over_the_prompts_and_keep_them() -> None:
    setting = mixture_setting()
    pairs = TeacherPairs(10, even_path(Flow(), 4), 2.0)
    pairs.prepare(setting)
    assert pairs.all.prompt.tolist() == [0] * 5 + [1] * 5
    assert setting.backbone.evaluations == {"teacher": 10 * 4 * 2}
    left, right = pairs.all.x0[:5, 0].mean(), pairs.all.x0[5:, 0].mean()
    assert left < 0.0 < right
    again = TeacherPairs(10, even_path(Flow(), 4), 2.0)
    again.prepare(setting)
    assert torch.equal(again.all.x0, pairs.all.x0)
    context = exact_context(setting, count=40)
    index = context.draws.integers("pairs", 10)
    taken = pairs.all.take(index)
    expected = context.backbone.x0(
        Role.STUDENT,
        taken.noise,
        context.levels(even_path(Flow(), 1).levels[0]),
        setting.book.take(taken.prompt),
    )
    loss, _ = PairRegression(pairs, even_path(Flow(), 1)).loss(context)
    torch.testing.assert_close(loss, (expected - taken.x0).square().mean())


def test_the_moment_guard_is_a_divergence_of_normals() -> None:
    mean, variance = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([0.5, 1.5, 0.8])
    peer = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(0.1, 0.9**0.5),
    )
    torch.testing.assert_close(moment_divergence(mean, variance, 0.1, 0.9), peer.mean())
    same = moment_divergence(torch.tensor([0.1]), torch.tensor([0.9]), 0.1, 0.9)
    assert same.item() == pytest.approx(0.0, abs=1e-7)


def test_a_student_that_draws_the_teachers_pictures_has_a_small_moment_loss() -> None:
    rollout = StudentRollout(FixedGrid(exact_path(1)), LAST_EXIT)
    pairs = pairs_of(exact_setting(), count=400, steps=50)
    exact = loss_of(MomentGuard(rollout, pairs), exact_student(), count=400)
    flat = loss_of(MomentGuard(rollout, pairs), exact_setting(), count=400)
    assert exact < 1.0 < flat


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
def test_a_level_and_a_batch_of_levels_agree_at_every_position(schedule: NoiseSchedule) -> None:
    for position in (0.0, 0.123, 0.5004, 0.87, 1.0):
        one = level_at(schedule, position)
        many = levels_at(schedule, torch.tensor([position], dtype=torch.float64))
        assert many.timestep.item() == pytest.approx(one.timestep, rel=1e-6)
        assert many.sigma.item() == pytest.approx(one.sigma, rel=1e-6)
        assert many.alpha.item() == pytest.approx(one.alpha, rel=1e-6)
