"""Guards: what they say, what they do, and that what they do survives a resume."""

import logging
import math

import pytest
import torch

from fewstep.errors import TrainingError
from fewstep.trainer.config_parts import GuardConfig
from fewstep.trainer.guards import MOST_NAN, Guard
from fewstep.trainer.learner import Learner
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.roles import Role
from tests.trainer.analytic import exact_run

DRIFTED = {"health/mean_drift": 0.9, "health/std_drift": 0.1}
STEADY = {"health/mean_drift": 0.1, "health/std_drift": 0.1}


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    learner = Learner(
        [weight], learning_rate=1.0, betas=(0.0, 0.9), grad_clip=1.0, scale_loss=False
    )
    metrics = learner.update([lambda: ((weight * math.nan).sum(), {})], 1.0)
    assert math.isnan(metrics["health/grad_norm"])
    assert weight.tolist() == [1.0, 1.0]
    learner.update([lambda: (weight.sum(), {})], 1.0)
    assert weight.tolist() != [1.0, 1.0]


def test_no_number_stops_the_run_and_says_what_to_do() -> None:
    guard = Guard(GuardConfig(nan="stop"))
    with pytest.raises(
        TrainingError, match="student's gradient is not a number at step 7"
    ) as caught:
        guard.after_step(7, {"health/grad_norm": math.nan})
    assert "lower learning rate" in str(caught.value)
    with pytest.raises(TrainingError, match="critic's gradient"):
        guard.after_step(8, {"health/critic_grad_norm": math.inf, "health/grad_norm": 1.0})


def test_skipping_ends_after_ten_in_a_row() -> None:
    guard = Guard(GuardConfig(nan="skip"))
    for step in range(MOST_NAN - 1):
        guard.after_step(step, {"health/grad_norm": math.nan})
    guard.after_step(50, {"health/grad_norm": 1.0})  # one good step begins the count again
    for step in range(MOST_NAN - 1):
        guard.after_step(step, {"health/grad_norm": math.nan})
    with pytest.raises(TrainingError):
        guard.after_step(99, {"health/grad_norm": math.nan})


def test_drift_warns_once_slows_or_stops(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guard = Guard(GuardConfig(drift=0.5, on_drift="slow"))
        guard.after_meters(1, STEADY)
        assert guard.is_healthy
        guard.after_meters(2, DRIFTED)
        guard.after_meters(3, DRIFTED)
    assert not guard.is_healthy
    assert guard.slow == 0.5
    assert len([r for r in caplog.records if "drift" in r.message]) == 1
    with pytest.raises(TrainingError, match="the exported adapter is the last one from before"):
        Guard(GuardConfig(drift=0.5, on_drift="stop")).after_meters(4, DRIFTED)
    Guard(GuardConfig(drift=0.0, on_drift="stop")).after_meters(5, DRIFTED)  # does not look


def test_a_lagging_critic_gets_more_steps_until_it_has_caught_up() -> None:
    match = MatchConfig(num_steps=4, critic_updates=1, critic_warmup=0)
    run = exact_run(Dmd2(match=match), batch_size=8)
    run.guard = Guard(GuardConfig(critic_lag=1.0, extra_critic_updates=3))
    advance(run)
    spent = run.backbone.evaluations["critic"]
    assert spent == 8 * 2  # one update, one question of the student's
    advance(run)
    assert run.backbone.evaluations["critic"] - spent == 8 * 5
    run.guard.after_step(9, {"health/dm_cos": 1.0})
    assert run.guard.extra_critic_updates == 0


def test_a_slowed_student_moves_half_as_far() -> None:
    moved = []
    for slow in (1.0, 0.5):
        run = exact_run(Dmd2(match=MatchConfig(num_steps=1, critic_warmup=0)), batch_size=8)
        run.guard.slow = slow
        before = [p.detach().clone() for p in run.setting.cast.parameters(Role.STUDENT)]
        run.update_student()
        after = run.setting.cast.parameters(Role.STUDENT)
        pairs = zip(before, after, strict=True)
        moved.append(sum(float((a - b.detach()).norm()) for a, b in pairs))
    assert moved[1] == pytest.approx(0.5 * moved[0], rel=1e-4)


def test_the_watch_goes_on_where_it_was() -> None:
    guard = Guard(GuardConfig(nan="skip", on_drift="slow", critic_lag=0.9))
    guard.after_step(1, {"health/grad_norm": math.nan, "health/dm_cos": 0.1})
    guard.after_meters(1, DRIFTED)
    other = Guard(guard.config)
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert other.extra_critic_updates == 2
    assert other.slow == 0.5
