"""Jump methods on an exact Gaussian teacher: few steps draw its mean and variance."""

import dataclasses

import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.trainer.components.jump import JumpTerm
from fewstep.trainer.components.jump_times import MergedSteps
from fewstep.trainer.components.moves import Ode
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.jumps import JumpConfig
from fewstep.trainer.methods.lcm import Lcm
from fewstep.trainer.methods.meanflow import Meanflow
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.progressive import ROUND, Progressive
from fewstep.trainer.methods.sfd import Sfd, TrajectoryConfig
from fewstep.trainer.methods.tcd import Tcd
from fewstep.trainer.roles import Role
from tests.trainer.analytic import MEAN, VARIANCE, exact_path, exact_run, finish, moments
from tests.trainer.residual import ResidualBackbone


def jumps(num_steps: int, learning_rate: float, **more: object) -> JumpConfig:
    return JumpConfig(num_steps=num_steps, learning_rate=learning_rate, **more)  # pyright: ignore


METHODS = {
    "lcm": (Lcm(jump=jumps(400, 0.01), teacher_steps=16, huber_c=0.1), 1.0),
    "lcm without data": (
        Lcm(jump=jumps(300, 0.005, source="teacher", source_steps=4), teacher_steps=16),
        1.0,
    ),
    "tcd": (Tcd(jump=jumps(150, 0.005), teacher_steps=64), 0.3),
    "tcd to the segments' ends": (
        Tcd(jump=jumps(150, 0.01), teacher_steps=32, segments=(8, 2), end="segment"),
        0.0,
    ),
    "progressive": (Progressive(jump=jumps(100, 0.02), rounds=4), 0.0),
    "sfd, all exits": (
        Sfd(
            trajectory=TrajectoryConfig(
                num_steps=100, learning_rate=0.02, teacher_substeps=8, exits="all", distance="l1"
            )
        ),
        0.0,
    ),
    "meanflow": (Meanflow(jump=jumps(600, 0.005), time_mean=0.0), 0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_reach_mean_and_variance(name: str) -> None:
    method, stochasticity = METHODS[name]
    run = exact_run(
        method,
        num_steps=2,
        batch_size=64,
        backbone=ResidualBackbone(),
        rank=16,
        stochasticity=stochasticity,
    )
    assert moments(run)[1] < 0.2 * VARIANCE
    mean, variance = moments(finish(run))
    assert abs(mean - MEAN) < 0.08
    assert abs(variance / VARIANCE - 1.0) < 0.3


def test_a_round_is_taught_by_what_the_round_before_left() -> None:
    method = Progressive(jump=jumps(3, 0.02), rounds=2)
    run = exact_run(method, num_steps=2, batch_size=8)
    ladders, teachers = [], []
    for stage in run.stages:
        term = stage.terms[0].term
        assert isinstance(term, JumpTerm)
        assert isinstance(term.times, MergedSteps)
        assert isinstance(term.transport, Ode)
        ladders.append(term.times.ladder.num_steps)
        teachers.append(term.transport.role)
    assert ladders == [8, 4]
    assert teachers == [Role.TEACHER, ROUND]
    cast = run.setting.cast

    def look(run: object) -> None:
        seen.append({k: v.clone() for k, v in cast.tensors(ROUND).items()})
        averages.append({k: v.clone() for k, v in cast.tensors(Role.AVERAGE).items()})

    seen: list[dict[str, torch.Tensor]] = []
    averages: list[dict[str, torch.Tensor]] = []
    finish(run, look)
    for name, value in averages[2].items():  # the end of the first round
        assert torch.equal(seen[3][name], value)
        assert torch.equal(seen[5][name], value)  # it does not move during the second
    assert any(not torch.equal(averages[5][n], averages[2][n]) for n in averages[2])


def test_the_last_rounds_levels_are_the_students() -> None:
    run = exact_run(Progressive(rounds=3), num_steps=2, batch_size=8)
    term = run.stages[-1].terms[0].term
    assert isinstance(term, JumpTerm)
    assert isinstance(term.times, MergedSteps)
    merged = term.times.ladder.levels[::2]
    assert merged == run.frame.path.levels == exact_path(2).levels


@pytest.mark.parametrize(
    "method", [Lcm(), Tcd(), Progressive()], ids=lambda method: method.facts.name
)
def test_listed_grids_are_refused(method: Method) -> None:
    with pytest.raises(ConfigError, match="grid.timesteps"):
        exact_run(method, num_steps=2, timesteps=(1000.0, 700.0))


def test_named_grids_and_data() -> None:
    grid = GridConfig(num_steps=4)
    assert Lcm().grid(grid).stochasticity == 1.0
    assert Tcd(gamma=0.2).grid(grid).stochasticity == 0.2
    assert Meanflow().grid(grid).stochasticity == Progressive().grid(grid).stochasticity == 0.0
    for source, wanted in (("data", True), ("teacher", False)):
        jump = dataclasses.replace(jumps(1, 0.1), source=source)
        for method in (Lcm(jump=jump), Tcd(jump=jump), Progressive(jump=jump)):
            stages = exact_run(method, num_steps=2, batch_size=4).stages
            assert {stage.uses_data for stage in stages} == {wanted}
            assert {stage.terms[0].term.needs_data for stage in stages} == {wanted}


@pytest.mark.parametrize(
    "method",
    [Lcm(jump=jumps(1, 0.1, scale_spread=0.5)), Tcd(), Progressive(), Meanflow()],
    ids=lambda method: method.facts.name,
)
def test_parts_of_a_batch_are_the_batch(method: Method) -> None:
    """Times, scales and starts belong to samples: cutting a batch changes nothing."""
    found = []
    for accumulation in (1, 4):
        run = exact_run(method, num_steps=2, batch_size=16, backbone=ResidualBackbone(), rank=2)
        object.__setattr__(run.config, "accumulation", accumulation)
        for parameter in run.setting.cast.parameters(Role.STUDENT):
            parameter.data.add_(0.05)
        parts = run.contexts(0, with_grad=True)
        assert len(parts) == accumulation
        losses = [run.stage.terms[0].term.loss(part)[0].item() for part in parts]
        found.append(sum(losses) / accumulation)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] > 0.0
