"""Roles on one base: exact gradients with checkpointing, whatever role is active in backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role, acting_as, current_role, role_checkpoint


class Stack(nn.Module):
    """Three linear layers with tanh, each one a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor, run: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if run is None else run(block, x)
        return x


def build() -> tuple[Stack, Cast]:
    torch.manual_seed(0)
    stack = Stack()
    cast = Cast(stack, {})
    generator = torch.Generator().manual_seed(1)
    for role in (Role.STUDENT, Role.CRITIC):
        cast.add(role, LoraPolicy(("blocks",), 2, 2.0), generator)
        for parameter in cast.parameters(role):
            parameter.data.normal_(generator=generator)
    return stack, cast


def gradients(run: Any, role_in_backward: Role) -> dict[Role, Tensor]:
    """Forward as student, backward while another role is active."""
    stack, cast = build()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with acting_as(Role.STUDENT):
        loss = stack(x, run).square().mean()
    with acting_as(role_in_backward):
        loss.backward()
    return {
        role: torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in cast.parameters(role)
            ]
        )
        for role in (Role.STUDENT, Role.CRITIC)
    }


def non_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


@pytest.mark.parametrize("other", [Role.TEACHER, Role.CRITIC, Role.STUDENT])
def test_role_checkpoint_gives_the_uncheckpointed_gradient(other: Role) -> None:
    plain = gradients(None, Role.STUDENT)
    checked = gradients(role_checkpoint, other)
    assert plain[Role.STUDENT].norm() > 0.1
    torch.testing.assert_close(checked[Role.STUDENT], plain[Role.STUDENT], rtol=0, atol=0)
    assert checked[Role.CRITIC].abs().max() == 0.0


def test_plain_checkpointing_is_silently_wrong_after_a_switch_to_the_critic() -> None:
    """Row 1 of the measured table: why role_checkpoint exists."""
    plain = gradients(None, Role.STUDENT)[Role.STUDENT]
    wrong = gradients(non_reentrant, Role.CRITIC)[Role.STUDENT]
    assert not torch.allclose(wrong, plain, rtol=0.01)


def test_plain_checkpointing_fails_after_a_switch_to_the_teacher() -> None:
    with pytest.raises(CheckpointError):
        gradients(non_reentrant, Role.TEACHER)


def test_reentrant_checkpointing_sends_the_gradient_to_the_wrong_adapter() -> None:
    plain = gradients(None, Role.STUDENT)
    after_teacher = gradients(reentrant, Role.TEACHER)
    after_critic = gradients(reentrant, Role.CRITIC)
    assert plain[Role.CRITIC].abs().max() == 0.0
    assert after_teacher[Role.STUDENT].abs().max() == 0.0
    assert after_critic[Role.STUDENT].abs().max() == 0.0
    assert after_critic[Role.CRITIC].norm() > 0.1


def test_the_role_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="boom"), acting_as(Role.CRITIC):
        raise RuntimeError("boom")
    assert current_role() is Role.TEACHER


def test_no_forward_ever_toggles_requires_grad() -> None:
    stack, cast = build()
    before = [p.requires_grad for p in stack.parameters()]
    for role in (Role.STUDENT, Role.CRITIC, Role.TEACHER):
        with acting_as(role):
            stack(torch.ones(1, 8))
    assert [p.requires_grad for p in stack.parameters()] == before
    trained = {id(p) for role in (Role.STUDENT, Role.CRITIC) for p in cast.parameters(role)}
    assert {id(p) for p in stack.parameters() if p.requires_grad} == trained


def test_diffusers_checkpointing_on_a_real_transformer_is_exact() -> None:
    """The same fact through SD3Transformer2DModel's own checkpointing."""
    from diffusers import SD3Transformer2DModel

    def run(use_checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            pos_embed_max_size=4,
        )
        cast = Cast(model, {})
        generator = torch.Generator().manual_seed(1)
        for role in (Role.STUDENT, Role.CRITIC):
            cast.add(role, LoraPolicy((r"attn\.", r"\.ff\."), 2, 2.0), generator)
            for parameter in cast.parameters(role):
                parameter.data.normal_(generator=generator)
        if use_checkpointing:
            model.enable_gradient_checkpointing(role_checkpoint)
            model.train()
        inputs = {
            "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
            "encoder_hidden_states": torch.randn(2, 3, 8, generator=generator),
            "pooled_projections": torch.randn(2, 8, generator=generator),
            "timestep": torch.tensor([10.0, 900.0]),
        }
        with acting_as(Role.STUDENT):
            loss = model(**inputs).sample.square().mean()
        with acting_as(Role.CRITIC):
            model(**inputs)
            loss.backward()
        return [p.grad for p in cast.parameters(Role.STUDENT) if p.grad is not None]

    plain, checked = run(False), run(True)
    assert len(plain) == len(checked) > 0
    for a, b in zip(plain, checked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
