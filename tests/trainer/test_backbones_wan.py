"""Wan 2.2: two networks behind one edge, told apart by each sample's timestep."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.backbones.two_networks import TwoNetworks
from fewstep.trainer.levels import Levels, levels_at
from fewstep.trainer.roles import Role, role_checkpoint
from tests.tiny_pipelines import build_wan22
from tests.trainer.backbone_cases import WAN21, WAN22, random_sample

BOUNDARY = 875.0
MIXED = (100.0, 950.0, 874.9, 875.0, 999.0)


def build() -> tuple[Backbone, TwoNetworks]:
    backbone = wrap_pipeline(WAN22.build())
    assert isinstance(backbone.denoiser, TwoNetworks)
    return backbone, backbone.denoiser


def levels_of(backbone: Backbone, timesteps: tuple[float, ...]) -> Levels:
    return levels_at(backbone.schedule, torch.tensor(timesteps) / 1000.0)


def ask(backbone: Backbone, sample: Tensor, timesteps: tuple[float, ...]) -> Tensor:
    condition = WAN22.condition().take(torch.arange(len(sample)) % 2)
    return backbone.x0(Role.TEACHER, sample, levels_of(backbone, timesteps), condition)


def test_a_batch_across_the_boundary_is_two_batches_in_the_order_given() -> None:
    backbone, networks = build()
    sample = random_sample(backbone, len(MIXED))
    together = ask(backbone, sample, MIXED)
    condition = WAN22.condition()
    for row, timestep in enumerate(MIXED):
        network = networks.transformer if timestep >= BOUNDARY else networks.transformer_2
        velocity = network(
            hidden_states=sample[row : row + 1],
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=condition.sequence[row % 2 :][:1],
            return_dict=False,
        )[0]
        alone = sample[row : row + 1] - timestep / 1000.0 * velocity
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert backbone.evaluations["teacher"] == len(MIXED)


def test_only_the_networks_that_are_asked_run() -> None:
    backbone, networks = build()
    rows: dict[str, list[int]] = {"transformer": [], "transformer_2": []}

    def count(name: str) -> Callable[[nn.Module, Any, tuple[Tensor]], None]:
        return lambda _, args, output: rows[name].append(len(output[0]))

    for name, child in networks.named_children():
        child.register_forward_hook(count(name))
    sample = random_sample(backbone, 4)
    ask(backbone, sample, (999.0, 950.0, 900.0, 875.0))
    assert rows == {"transformer": [4], "transformer_2": []}
    ask(backbone, sample, (1.0, 2.0, 3.0, 4.0))
    assert rows == {"transformer": [4], "transformer_2": [4]}
    ask(backbone, sample, (999.0, 2.0, 3.0, 4.0))
    assert rows == {"transformer": [4, 1], "transformer_2": [4, 3]}


def test_a_twin_asks_the_network_of_its_noise() -> None:
    """The boundary is one of noise, not of the sign that a twin's time has."""
    backbone, networks = build()
    asked: list[str] = []
    for name, child in networks.named_children():
        child.register_forward_hook(lambda *_, name=name: asked.append(name))
    sample, condition = random_sample(backbone, 1), WAN22.condition().take(torch.tensor([0]))
    for timestep in (950.0, 100.0):
        levels = levels_of(backbone, (timestep,))
        backbone.x0(Role.TEACHER.twin(), sample, levels, condition)
    assert asked == ["transformer", "transformer_2"]


def gradients(backbone: Backbone, timesteps: tuple[float, ...], rows: slice) -> dict[str, Tensor]:
    sample = random_sample(backbone, len(MIXED))
    backbone.denoiser.zero_grad(set_to_none=True)
    condition = (
        WAN22.condition().take(torch.arange(len(sample)) % 2).take(torch.arange(len(sample))[rows])
    )
    levels = levels_of(backbone, timesteps[rows])
    backbone.x0(Role.STUDENT, sample[rows], levels, condition).square().sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in backbone.denoiser.named_parameters()
        if parameter.grad is not None
    }


def test_gradients_of_a_mixed_batch_are_those_of_its_parts() -> None:
    backbone, _ = build()
    mixed = gradients(backbone, MIXED, slice(None))
    parts = [gradients(backbone, MIXED, slice(row, row + 1)) for row in range(len(MIXED))]
    assert {name.partition(".")[0] for name in parts[0]} == {"transformer_2"}
    assert {name.partition(".")[0] for name in parts[1]} == {"transformer"}
    assert set(mixed) == set(parts[0]) | set(parts[1])
    for name, gradient in mixed.items():
        expected = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_gradients_are_the_same() -> None:
    plain, _ = build()
    checkpointed, networks = build()
    networks.enable_gradient_checkpointing(role_checkpoint)
    networks.train()
    assert all(child.gradient_checkpointing for child in networks.children())
    first = gradients(plain, MIXED, slice(None))
    second = gradients(checkpointed, MIXED, slice(None))
    assert set(first) == set(second)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient)


def test_a_copy_of_both_is_a_roles_own_network() -> None:
    backbone, networks = build()
    own = backbone.own_networks["critic"] = copy.deepcopy(networks)
    sample = random_sample(backbone, len(MIXED))
    with torch.no_grad():
        for parameter in own.transformer_2.parameters():
            parameter.mul_(1.1)
        teacher = ask(backbone, sample, MIXED)
        condition = WAN22.condition().take(torch.arange(len(MIXED)) % 2)
        critic = backbone.x0(Role.CRITIC, sample, levels_of(backbone, MIXED), condition)
    changed = (critic - teacher).abs().amax(dim=(1, 2, 3, 4)) > 0.0
    assert changed.tolist() == [timestep < BOUNDARY for timestep in MIXED]


def test_guided_halves_may_lie_across_the_boundary() -> None:
    backbone, _ = build()
    sample = random_sample(backbone, 2)
    levels = levels_of(backbone, (950.0, 100.0))
    condition, null = WAN22.condition(), WAN22.null_condition()
    guided = backbone.guided_x0(Role.TEACHER, sample, levels, condition, null, 5.0)
    cond = backbone.x0(Role.TEACHER, sample, levels, condition)
    uncond = backbone.x0(Role.TEACHER, sample, levels, null.expand(2))
    torch.testing.assert_close(guided, uncond + 5.0 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_module_paths_name_the_component_and_tensors_are_split_by_it() -> None:
    backbone, networks = build()
    assert [name for name, _ in networks.named_children()] == ["transformer", "transformer_2"]
    assert networks.transformer is backbone.pipe.transformer  # adapters reach the pipeline too
    paths = [
        path
        for path, module in networks.named_modules()
        if isinstance(module, nn.Linear) and path.endswith("attn1.to_q")
    ]
    tensors = {f"{path}.lora_A.weight": torch.full((1,), float(i)) for i, path in enumerate(paths)}
    parts = backbone.by_component(tensors)
    name = "blocks.0.attn1.to_q.lora_A.weight"
    assert {key: list(part) for key, part in parts.items()} == {
        "transformer": [name],
        "transformer_2": [name],
    }
    assert [float(part[name]) for part in parts.values()] == [0.0, 1.0]
    one = wrap_pipeline(WAN21.build())
    assert one.experts == ()
    assert one.by_component(tensors) == {"transformer": tensors}


def test_experts_are_the_two_intervals() -> None:
    backbone, _ = build()
    assert [(e.adapter, e.sigma_high, e.sigma_low, e.component) for e in backbone.experts] == [
        ("high_noise", 1.0, 0.875, "transformer"),
        ("low_noise", 0.875, 0.0, "transformer_2"),
    ]


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_a_pipeline_without_one_of_its_networks_is_refused(missing: str) -> None:
    pipe: Any = build_wan22()
    pipe.register_modules(**{missing: None})
    with pytest.raises(ConfigError, match="without one of its transformers"):
        wrap_pipeline(pipe)
