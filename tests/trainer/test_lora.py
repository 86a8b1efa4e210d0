"""The role layer equals PEFT's LoRA, and the bank's names are PEFT's."""

import pytest
import torch
from torch import nn

from fewstep.errors import AdapterError, ConfigError
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role, acting_as


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )


def filled_cast(model: nn.Module, rank: int = 4, alpha: float = 2.0):  # noqa: ANN201
    cast = Cast(model, {})
    generator = torch.Generator().manual_seed(3)
    cast.add(Role.STUDENT, LoraPolicy((r"^\d+$",), rank, alpha), generator)
    for parameter in cast.parameters(Role.STUDENT):
        parameter.data.normal_(generator=generator)
    return cast


def test_the_layer_equals_peft() -> None:
    from peft import LoraConfig, get_peft_model

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    cast = filled_cast(ours := small_model())
    theirs = get_peft_model(small_model(), LoraConfig(r=4, lora_alpha=2, target_modules=["0", "3"]))
    state = {
        f"base_model.model.{name.replace('.weight', '.default.weight')}": tensor
        for name, tensor in cast.tensors(Role.STUDENT).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    with acting_as(Role.STUDENT), torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_teacher_is_the_untouched_base_and_a_new_adapter_changes_nothing() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = small_model()(x)
    model = small_model()
    policy = LoraPolicy((r"^\d+$",), 2, 2.0)
    Cast(model, {}).add(Role.STUDENT, policy, torch.Generator().manual_seed(0))
    for role in (Role.TEACHER, Role.STUDENT):
        with acting_as(role):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_blend_is_an_exponential_average() -> None:
    model = small_model()
    cast = filled_cast(model)
    policy = LoraPolicy((r"^\d+$",), 4, 2.0)
    cast.add(Role.AVERAGE, policy, torch.Generator().manual_seed(9))
    before = {k: v.clone() for k, v in cast.tensors(Role.AVERAGE).items()}
    cast.blend(Role.AVERAGE, Role.STUDENT, keep=0.75)
    for name, value in cast.tensors(Role.AVERAGE).items():
        expected = 0.75 * before[name] + 0.25 * cast.tensors(Role.STUDENT)[name]
        torch.testing.assert_close(value, expected)


def test_loading_another_shape_or_name_is_refused() -> None:
    cast = filled_cast(small_model())
    wrong_rank = filled_cast(small_model(), rank=2).tensors(Role.STUDENT)
    with pytest.raises(AdapterError, match="lora.rank"):
        cast.load(Role.STUDENT, wrong_rank)
    with pytest.raises(AdapterError, match="do not match this base"):
        cast.load(Role.STUDENT, {"x.lora_A.weight": torch.zeros(1)})


def test_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="match no linear or conv layer"):
        Cast(small_model(), {}).add(
            Role.STUDENT, LoraPolicy((r"^\d+$", "transformer_blocks"), 2, 2.0), torch.Generator()
        )


def test_a_half_precision_base_keeps_float32_adapters() -> None:
    model = small_model().to(torch.bfloat16)
    cast = filled_cast(model)
    assert {p.dtype for p in cast.parameters(Role.STUDENT)} == {torch.float32}
    with acting_as(Role.STUDENT):
        output = model(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None for p in cast.parameters(Role.STUDENT))
