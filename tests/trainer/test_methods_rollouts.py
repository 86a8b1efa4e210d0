"""dmd, decoupled-dmd, dp-dmd, cdm and senseflow on the exact Gaussian: where they end, and why."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow
from fewstep.trainer.components.anchors import FirstStepAnchor, SegmentGuide
from fewstep.trainer.components.grids import ANY_EXIT, NOT_FIRST_EXIT, Exit, FixedGrid, RandomGrid
from fewstep.trainer.components.moments import MomentGuard
from fewstep.trainer.components.rollouts import DataRollout, Either, OffPath, StudentRollout
from fewstep.trainer.components.signals import GuidanceAugmentation, ScoreDifference
from fewstep.trainer.components.targets import Guided
from fewstep.trainer.components.taus import Above, Below, Full, LogitNormal
from fewstep.trainer.config import GridConfig, TrainConfig
from fewstep.trainer.context import Setting
from fewstep.trainer.levels import Levels
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.cdm import Cdm, RandomGridConfig
from fewstep.trainer.methods.decoupled_dmd import DecoupledDmd
from fewstep.trainer.methods.dmd import Dmd, PairsConfig
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.dp_dmd import AnchorConfig, DpDmd
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.senseflow import Senseflow
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import PhaseRoute
from fewstep.trainer.run import Run
from fewstep.trainer.stages import Stage
from tests.trainer.analytic import (
    MEAN,
    VARIANCE,
    exact_context,
    exact_path,
    exact_run,
    exact_setting,
    finish,
    moments,
)
from tests.trainer.oracles import Answer

DEVIATION = math.sqrt(VARIANCE)


def match(**settings: Any) -> MatchConfig:
    """Rates for a linear student."""
    rates = MatchConfig(
        num_steps=200,
        learning_rate=0.02,
        critic_learning_rate=0.04,
        critic_updates=2,
        critic_warmup=20,
    )
    return replace(rates, **settings)


def few(method_match: MatchConfig) -> MatchConfig:
    return replace(method_match, num_steps=4, critic_updates=1, critic_warmup=2)


@pytest.mark.parametrize(
    ("method", "num_steps"),
    [
        (Dmd(match=match(critic_updates=1), pairs=PairsConfig(count=64)), 1),
        (DecoupledDmd(match=match(exit="last")), 2),
        (DpDmd(match=match(exit="not-first")), 2),
        (Cdm(match=match(ida=0.999), random=RandomGridConfig(most=1)), 1),
        (Senseflow(match=match(ida=0.97), segment_weight=0.0), 1),
    ],
    ids=lambda value: value.facts.name if isinstance(value, Method) else None,
)
def test_the_student_reaches_the_teachers_mean_and_variance(method: Method, num_steps: int) -> None:
    run = exact_run(method, num_steps=num_steps, batch_size=64)
    assert moments(run)[1] < 0.2 * VARIANCE
    mean, variance = moments(finish(run))
    assert mean == pytest.approx(MEAN, abs=0.08)
    assert variance == pytest.approx(VARIANCE, rel=0.2)


def trained(method: Method, num_steps: int = 1) -> list[Tensor]:
    run = finish(exact_run(method, num_steps=num_steps, batch_size=16))
    return [p.detach().clone() for p in run.setting.cast.parameters(Role.STUDENT)]


@pytest.mark.parametrize(
    ("method", "num_steps"),
    [
        (DecoupledDmd(match=few(match())), 3),
        (Cdm(match=few(match()), random=RandomGridConfig(most=1), off_path_weight=0.0), 1),
        (Dmd(match=few(match()), pairs=PairsConfig(weight=0.0, count=4)), 1),
    ],
    ids=["decoupled-dmd", "cdm", "dmd"],
)
def test_without_what_it_adds_a_method_is_dmd2(method: Method, num_steps: int) -> None:
    """Same draws, so the same weights bit for bit. The exact run has no guidance."""
    for mine, other in zip(
        trained(method, num_steps), trained(Dmd2(match=few(match())), num_steps), strict=True
    ):
        assert torch.equal(mine, other)


def test_what_a_method_adds_is_not_nothing() -> None:
    plain = trained(Dmd2(match=few(match())))
    for method in (
        Cdm(match=few(match()), random=RandomGridConfig(most=1)),
        Dmd(match=few(match())),
        Senseflow(match=few(match()), data_share=0.0),
    ):
        mine = trained(method)
        assert any(not torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def stage_of(method: Method, *, guidance: float, num_steps: int = 4) -> Stage:
    run = exact_run(method, num_steps=num_steps, batch_size=4)
    frame = replace(run.frame, config=replace(run.config, guidance_scale=guidance))
    (stage,) = method.stages(frame)
    return stage


@pytest.mark.parametrize(("span", "kind"), [("below", Below), ("above", Above), ("full", Full)])
def test_decoupled_dmd_splits_the_guided_difference(span: Any, kind: type) -> None:
    stage = stage_of(DecoupledDmd(guidance_span=span, guidance_weight=0.5), guidance=3.0)
    guided, matching = (part.term for part in stage.terms)
    assert isinstance(guided, GuidanceAugmentation)
    assert isinstance(guided.tau.span, kind)
    assert guided.law.scale(torch.zeros(1)) == 3.0
    assert stage.terms[0].weight == 0.5
    assert isinstance(matching, ScoreDifference)
    assert matching.target == Guided()
    assert isinstance(matching.tau.span, Full)
    assert matching.name != guided.name


def test_moments_take_the_place_of_matching_and_of_its_critic() -> None:
    method = DecoupledDmd(match=few(match()), regulariser="moments")
    stage = stage_of(method, guidance=3.0)
    assert stage.critic is None
    assert [type(part.term) for part in stage.terms] == [GuidanceAugmentation, MomentGuard]
    run = finish(exact_run(method, num_steps=2, batch_size=8))
    assert run.step == 4
    assert set(run.backbone.evaluations) == {"student", "teacher"}


def two_experts() -> Setting:
    """A student per step of a grid of two, so that gradients show which step they are of."""
    students = [Role.STUDENT.expert(0), Role.STUDENT.expert(1)]
    setting = exact_setting([*students, Role.CRITIC])
    for role in (*students, Role.CRITIC):
        for parameter in setting.cast.parameters(role):
            parameter.data.add_(0.1)
    return replace(setting, route=PhaseRoute((1.0, 0.5, 0.0)))


def test_matching_never_reaches_the_first_step_and_the_anchor_only_that() -> None:
    setting, grid = two_experts(), FixedGrid(exact_path(2))
    matching = ScoreDifference(StudentRollout(grid, NOT_FIRST_EXIT), Guided())
    anchor = FirstStepAnchor(StudentRollout(grid, Exit(0, 0)), exact_path(12), 3, 1.0)
    for term, reached, untouched in ((matching, 1, 0), (anchor, 0, 1)):
        for step in range(3):
            term.loss(exact_context(setting, count=8, step=step))[0].backward()
        grads = [p.grad for p in setting.cast.parameters(Role.STUDENT.expert(reached))]
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
        assert all(p.grad is None for p in setting.cast.parameters(Role.STUDENT.expert(untouched)))
        for parameter in setting.cast.parameters(Role.STUDENT.expert(reached)):
            parameter.grad = None


def test_dp_dmd_keeps_the_noise_that_its_first_step_was_given() -> None:
    """The anchored first step spreads like the teacher's path; matching leaves it the mean."""
    spreads: list[float] = []
    for method in (
        DpDmd(match=match(exit="not-first", num_steps=80), anchor=AnchorConfig(weight=1.0)),
        Dmd2(match=match(exit="not-first", num_steps=80)),
    ):
        run = finish(exact_run(method, num_steps=2, batch_size=32))
        level, following = run.frame.path.levels[:2]
        context = exact_context(run.setting, count=200, with_grad=False)
        noise = context.normal("test")
        x0 = context.student_x0(noise, level, following).detach()
        correlation = torch.corrcoef(torch.stack([x0.flatten(), noise.flatten()]))[0, 1]
        spreads.append(float(correlation * x0.std()))
    assert spreads[0] > 2.0 * abs(spreads[1])


def straight(sample: Tensor, levels: Levels, labels: Tensor) -> Tensor:
    """x0 of the straight lines from noise z to m + deviation z: any grid of the ODE ends there."""
    z = (sample - levels.alpha * MEAN) / (levels.alpha * DEVIATION + levels.sigma)
    return MEAN + DEVIATION * z


def test_on_random_grids_and_beside_them_a_straight_student_has_arrived() -> None:
    """Its x0 is exact at every exit, so the critic's best answer is the teacher: a fixed point."""
    setting = exact_setting()
    setting.backbone.own_networks["student"] = Answer(straight, Flow())
    law = RandomGrid(Flow(), 1, 8)
    for step in range(10):
        context = exact_context(setting, count=8, step=step, with_grad=False)
        around = StudentRollout(law, pick="left")
        start = context.rolled(around).start
        assert start is not None
        end = MEAN + DEVIATION * start
        for rollout in (StudentRollout(law), around):
            torch.testing.assert_close(context.rolled(rollout).x0, end)
        torch.testing.assert_close(context.rolled(OffPath(around)).x0, end)


def test_cdm_sees_three_steps_of_one_trajectory() -> None:
    stage = stage_of(Cdm(), guidance=3.0)
    guided, matched, beside = (part.term for part in stage.terms)
    assert isinstance(guided, GuidanceAugmentation)
    assert isinstance(guided.tau.span, Below)
    assert isinstance(matched, ScoreDifference)
    assert isinstance(beside, ScoreDifference)
    assert isinstance(beside.rollout, OffPath)
    rollouts = [guided.rollout, matched.rollout, beside.rollout.around]
    assert all(isinstance(r, StudentRollout) and r.name == "rollout" for r in rollouts)
    assert len({r.pick for r in rollouts if isinstance(r, StudentRollout)}) == 3
    assert stage.critic is not None
    assert stage.critic.keep == 0.999


def test_senseflow_holds_the_critic_near_the_student() -> None:
    """critic = keep * critic + (1 - keep) * student: at 0 it is the student, near 1 its own."""
    found: dict[float, Run] = {}
    own = 1.0 - 1e-9
    for keep in (0.0, 0.6, own):
        method = Senseflow(match=replace(few(match()), ida=keep))
        found[keep] = exact_run(method, num_steps=2, batch_size=8)
        advance(found[keep])

    def of(keep: float, role: Role) -> Tensor:
        return torch.cat([p.flatten() for p in found[keep].setting.cast.parameters(role)])

    assert torch.equal(of(0.0, Role.CRITIC), of(0.0, Role.STUDENT))
    mixed = 0.6 * of(own, Role.CRITIC) + 0.4 * of(own, Role.STUDENT)
    torch.testing.assert_close(of(0.6, Role.CRITIC), mixed)
    assert not torch.equal(of(own, Role.CRITIC), of(own, Role.STUDENT))


def test_a_critic_that_is_mixed_with_the_student_begins_as_it() -> None:
    """Otherwise factors of two beginnings would be mixed, which is neither's network."""
    for method in (Senseflow(match=few(match(ida=0.9))), Cdm(match=few(match(ida=0.9)))):
        run = exact_run(method, batch_size=4)
        (copied,) = run.stage.due(0.0, 0.0, is_first=True)
        before = run.setting.cast.tensors(Role.CRITIC)
        assert any(not torch.equal(before[k], v) for k, v in student_tensors(run).items())
        copied.act(run.setting.cast)
        after = run.setting.cast.tensors(Role.CRITIC)
        assert all(torch.equal(after[k], v) for k, v in student_tensors(run).items())
    assert not exact_run(Senseflow(match=few(match())), batch_size=4).stage.actions


def student_tensors(run: Run) -> dict[str, Tensor]:
    return run.setting.cast.tensors(Role.STUDENT)


def test_senseflow_is_made_of_its_parts() -> None:
    stage = stage_of(Senseflow(), guidance=2.0)
    assert stage.uses_data
    matching, guide = (part.term for part in stage.terms)
    assert isinstance(matching, ScoreDifference)
    assert isinstance(matching.tau.density, LogitNormal)
    assert isinstance(guide, SegmentGuide)
    assert isinstance(matching.rollout, Either)
    assert isinstance(matching.rollout.first, DataRollout)
    assert matching.rollout.share == 0.5
    without = stage_of(Senseflow(data_share=0.0, segment_weight=0.0), guidance=2.0)
    assert not without.uses_data
    assert len(without.terms) == 1
    rollout = without.terms[0].term
    assert isinstance(rollout, ScoreDifference)
    assert rollout.rollout == StudentRollout(FixedGrid(exact_path(4)), ANY_EXIT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainConfig(method=Dmd(), grid=GridConfig(num_steps=4)),
            "set grid.num-steps to 1",
        ),
        (
            lambda: TrainConfig(method=Dmd(), grid=GridConfig(num_steps=1, also_steps=(2,))),
            "got grid steps 1, 2",
        ),
        (lambda: TrainConfig(method=DpDmd(), grid=GridConfig(num_steps=1)), "2 steps or more"),
        (
            lambda: TrainConfig(method=DpDmd(), grid=GridConfig(num_steps=4, also_steps=(1,))),
            "leave 1 out of grid.also-steps",
        ),
        (
            lambda: TrainConfig(method=DpDmd(match=MatchConfig(exit="last"))),
            "leave it at not-first",
        ),
        (lambda: TrainConfig(method=Cdm(), grid=GridConfig(stochasticity=1.0)), "set it to 0"),
        (
            lambda: TrainConfig(method=Cdm(match=MatchConfig(exit="not-first"))),
            "raise random.least to 2",
        ),
        (lambda: AnchorConfig(teacher_steps=4, steps=5), "steps must be 1 to 4, got 5"),
        (lambda: RandomGridConfig(least=4, most=2), "most must be >= 4, got 2"),
    ],
)
def test_what_a_method_cannot_do_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_pairs_are_paid_once() -> None:
    """The budget sees them before the first step, and they are made the same again."""
    method = Dmd(match=few(match()), pairs=PairsConfig(count=10, teacher_steps=3))
    run = exact_run(method, batch_size=8)
    assert run.backbone.evaluations == {"teacher": 30}
    again = exact_run(method, batch_size=8)
    first, second = (one.stages[0].preparations[0] for one in (run, again))
    assert torch.equal(first.all.x0, second.all.x0)  # pyright: ignore[reportAttributeAccessIssue]
