"""The loop and its stages on an exact teacher: a linear student reaches mean and variance."""

import torch

from fewstep.trainer.context import StepContext
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.sfd import Sfd, TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Copy, Reset, Stage
from tests.trainer.analytic import MEAN, VARIANCE, exact_path, exact_run, finish, moments

MATCH = MatchConfig(
    num_steps=200,
    learning_rate=0.02,
    critic_learning_rate=0.04,
    critic_updates=4,
    critic_warmup=0,
)


def test_a_linear_student_reaches_mean_and_variance_by_distribution_matching() -> None:
    """From the posterior mean (variance 0) to N(1.5, 0.25), seeing only scores."""
    run = exact_run(Dmd2(match=MATCH), batch_size=128)
    assert moments(run)[1] < 0.01
    mean, variance = moments(finish(run))
    assert abs(mean - MEAN) < 0.08
    assert abs(variance / VARIANCE - 1.0) < 0.25


def test_a_linear_student_follows_the_teachers_trajectory() -> None:
    """Two student steps land where sixteen teacher steps do."""
    config = TrajectoryConfig(num_steps=200, learning_rate=0.02, teacher_substeps=16)
    run = exact_run(Sfd(trajectory=config), num_steps=2, batch_size=64)
    before = moments(run)[1]
    mean, variance = moments(finish(run))
    assert before < 0.2 * VARIANCE
    assert abs(mean - MEAN) < 0.08
    assert 0.75 < variance / VARIANCE < 1.1


def loss_of(run: object, context: StepContext) -> torch.Tensor:
    stage: Stage = run.stage  # pyright: ignore[reportAttributeAccessIssue]
    return torch.stack([part.term.loss(context)[0] for part in stage.terms]).sum()


def test_accumulated_parts_give_the_gradient_of_the_large_batch() -> None:
    found = []
    for accumulation in (1, 4):
        run = exact_run(Dmd2(match=MATCH), num_steps=4, batch_size=16, stochasticity=0.5)
        object.__setattr__(run.config, "accumulation", accumulation)
        parameters = run.setting.cast.parameters(Role.STUDENT)
        for parameter in parameters:
            parameter.data.add_(0.1)
        parts = run.contexts(0, with_grad=True)
        assert len(parts) == accumulation
        sum(loss_of(run, part) / accumulation for part in parts).backward()  # pyright: ignore
        found.append([p.grad for p in parameters])
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-5, atol=1e-7)


def test_only_the_intended_role_gets_gradients() -> None:
    run = exact_run(Dmd2(match=MATCH), num_steps=4, batch_size=8)
    cast = run.setting.cast
    before = {r: [p.detach().clone() for p in cast.parameters(Role(r))] for r in cast.policies}

    def changed(role: Role) -> bool:
        pairs = zip(before[role.name], cast.parameters(role), strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)

    run.update_critic(1)
    assert changed(Role.CRITIC)
    assert not changed(Role.STUDENT)
    run.update_student()
    assert changed(Role.STUDENT)
    assert all(p.grad is None for role in cast.policies for p in cast.parameters(Role(role)))
    assert run.backbone.denoiser.get_parameter("head.base.weight").grad is None


def test_the_second_stage_starts_from_the_average_with_fresh_optimizers() -> None:
    warm = TrajectoryConfig(num_steps=3, learning_rate=0.05, teacher_substeps=2)
    match = MatchConfig(num_steps=1, critic_warmup=0, critic_updates=1)
    run = exact_run(WarmDmd2(warm_start=warm, match=match), num_steps=2, batch_size=8)
    seen = []

    def look(run: object) -> None:
        cast = run.setting.cast  # pyright: ignore[reportAttributeAccessIssue]
        student, average = cast.tensors(Role.STUDENT), cast.tensors(Role.AVERAGE)
        seen.append(all(torch.equal(student[name], average[name]) for name in student))

    finish(run, look)
    assert seen == [False, False, True, True]  # equal on both seams: the last stage ends alike
    assert run.step == 4
    assert run.student is None


def test_actions_happen_once_each_at_their_moment() -> None:
    early, late = Reset(Role.CRITIC), Copy(Role.CRITIC, Role.STUDENT, at=0.5)
    stage = Stage(name="x", num_steps=4, actions=(early, late))
    assert stage.due(0.0, 0.0, is_first=True) == [early]
    assert stage.due(0.0, 0.25, is_first=False) == []
    assert stage.due(0.25, 0.5, is_first=False) == [late]
    assert stage.due(0.5, 0.75, is_first=False) == []


def test_a_budget_counts_network_calls_and_ends_the_run() -> None:
    run = exact_run(Dmd2(match=MATCH), num_steps=1, batch_size=8)
    object.__setattr__(run.config, "budget", 8 * 100)
    finish(run)
    # a step: four critic updates (rollout, critic) and the student's (rollout, teacher, critic)
    assert sum(run.backbone.evaluations.values()) == 8 * 110
    assert run.backbone.evaluations["critic"] == 8 * 50


def test_the_exact_path_is_even() -> None:
    path = exact_path(4)
    assert [round(level.timestep) for level in path.levels] == [1000, 750, 500, 250, 0]
