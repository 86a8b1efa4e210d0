"""Two-time heads of roles: one per role, beside the adapters, and in the file of the product."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.adapters.header import read_header
from fewstep.adapters.kinds import adapter_parts
from fewstep.errors import ConfigError
from fewstep.heads.two_time import target_time
from fewstep.recipe import METADATA_KEY, FewStepRecipe
from fewstep.trainer.methods.meanflow import Meanflow
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.parameters.two_time import TwoTimePolicy
from fewstep.trainer.roles import Role, acting_as
from tests.trainer.analytic import exact_run, finish
from tests.trainer.residual import ResidualBackbone

LORA = LoraPolicy(ResidualBackbone.lora_targets, 2, 2.0)


def build() -> tuple[ResidualBackbone, Cast]:
    backbone = ResidualBackbone()
    cast = Cast(backbone.denoiser, backbone.own_networks)
    generator = torch.Generator().manual_seed(0)
    cast.add(Role.CRITIC, LORA, generator)  # the embedding is adapted before it gets a head
    for role in (Role.STUDENT, Role.AVERAGE):
        cast.add(role, TwoTimePolicy(LORA, hidden=8), generator)
    return backbone, cast


def answer(backbone: ResidualBackbone, role: Role, target: float | None) -> torch.Tensor:
    sample = torch.linspace(-1.0, 1.0, 8).reshape(2, 4, 1, 1)
    now = torch.tensor([800.0, 500.0])
    with acting_as(role):
        if target is None:
            return backbone.denoiser(sample, now)
        with target_time(torch.tensor([target]), now):
            return backbone.denoiser(sample, now)


def test_every_role_has_its_own_head_and_the_others_are_deaf() -> None:
    backbone, cast = build()
    untouched = answer(backbone, Role.TEACHER, None)
    assert torch.equal(answer(backbone, Role.STUDENT, 100.0), untouched)  # nothing until trained
    head = {n: p for n, p in cast.named(Role.STUDENT) if n.startswith("two_time.")}
    assert sorted(head) == [
        f"two_time.linear_{k}.{name}" for k in (1, 2) for name in ("bias", "weight")
    ]
    head["two_time.linear_2.weight"].data.fill_(0.1)
    near, far = (answer(backbone, Role.STUDENT, target) for target in (400.0, 100.0))
    assert not torch.equal(near, far)
    assert torch.equal(answer(backbone, Role.STUDENT, None), untouched)
    for role in (Role.TEACHER, Role.CRITIC, Role.AVERAGE, Role.STUDENT.scaled(0.0)):
        assert torch.equal(answer(backbone, role, 100.0), untouched)


def test_names_of_adapters_do_not_change_and_roles_copy_and_blend() -> None:
    backbone, cast = build()
    plain = {n for n, _ in cast.named(Role.CRITIC)}
    assert {n for n, _ in cast.named(Role.STUDENT) if not n.startswith("two_time.")} == plain
    for parameter in cast.parameters(Role.STUDENT):
        parameter.data.normal_()
    cast.copy(Role.AVERAGE, Role.STUDENT)
    torch.testing.assert_close(
        answer(backbone, Role.AVERAGE, 100.0), answer(backbone, Role.STUDENT, 100.0)
    )
    cast.blend(Role.AVERAGE, Role.STUDENT, 0.5)
    assert len(cast.parameters(Role.STUDENT)) == len(plain) + 4


def test_a_network_without_a_time_embedding_is_refused() -> None:
    cast = Cast(nn.Sequential(nn.Linear(4, 4)), {})
    with pytest.raises(ConfigError, match="choose a method without a two-time head"):
        cast.add(Role.STUDENT, TwoTimePolicy(LoraPolicy(("0",), 1, 1.0)), torch.Generator())


def test_the_product_holds_the_head_and_says_flow_map(tmp_path: Path) -> None:
    from fewstep.trainer.adapter import write_product
    from fewstep.trainer.run_folder import RunFolder

    method = Meanflow()
    method = dataclasses.replace(method, jump=dataclasses.replace(method.jump, num_steps=2))
    run = exact_run(method, num_steps=2, batch_size=4, backbone=ResidualBackbone())
    before = run.setting.cast.tensors(Role.AVERAGE)["two_time.linear_2.weight"].clone()
    finish(run)
    file = write_product(RunFolder(tmp_path), run.setting, run.frame, {}, run.step)
    parts = adapter_parts(read_header(file))
    assert parts.kind == "two_time"
    recipe = FewStepRecipe.from_json(read_header(file).metadata[METADATA_KEY])
    assert recipe.sampler.kind == "flow_map"
    after = run.setting.cast.tensors(Role.AVERAGE)["two_time.linear_2.weight"]
    assert not torch.equal(before, after)


def test_meanflow_refuses_students_that_are_told_nothing() -> None:
    run = exact_run(Meanflow(), num_steps=2, batch_size=4, backbone=ResidualBackbone())
    lora = dataclasses.replace(run.config.lora, student="lora")
    with pytest.raises(ConfigError, match="set it to two-time"):
        dataclasses.replace(run.config, lora=lora)
    grid = dataclasses.replace(run.config.grid, stochasticity=0.5)
    with pytest.raises(ConfigError, match="steps are deterministic"):
        dataclasses.replace(run.config, grid=grid)
