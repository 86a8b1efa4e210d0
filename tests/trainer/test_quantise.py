"""A packed base: near the plain one, smaller, and trained through as if it were plain."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3
from fewstep.errors import ConfigError, MissingExtraError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.levels import levels_at
from fewstep.trainer.loop import train
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.quantise import (
    Int8Linear,
    packed_int8,
    packed_nf4,
    quantise,
    stored_bytes,
    stored_parts,
)
from fewstep.trainer.roles import Role, role_checkpoint
from tests.trainer.parallel_cases import config_for

CPU = torch.device("cpu")
Pack = Callable[[nn.Linear], nn.Linear]
needs_torchao = pytest.mark.skipif(  # by file: importing it is slow
    not any((Path(folder) / "torchao").is_dir() for folder in sys.path), reason="needs torchao"
)
needs_bitsandbytes = pytest.mark.skipif(
    not any((Path(folder) / "bitsandbytes").is_dir() for folder in sys.path),
    reason="needs bitsandbytes",
)
KINDS = [
    pytest.param("int8", 0.02, marks=needs_torchao),
    pytest.param("nf4", 0.25, marks=needs_bitsandbytes),
]
"""Kind -> largest relative change of an untrained network's prediction."""


def teacher(kind: str = "none", dtype: torch.dtype = torch.float32) -> Backbone:
    """An untrained digits teacher, packed or not."""
    torch.manual_seed(0)
    pipe: Any = build_sd3(build_autoencoder())
    backbone = wrap_pipeline(pipe.to(dtype), max_sequence_length=1)
    backbone.denoiser.requires_grad_(False)
    if kind != "none":
        quantise(backbone.denoiser, kind, CPU)  # pyright: ignore[reportArgumentType]
    return backbone


def ask(backbone: Backbone, role: Role = Role.TEACHER) -> Tensor:
    """x0 at four noise levels."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(4, *backbone.latent_shape(), generator=generator)
    levels = levels_at(backbone.schedule, torch.tensor([0.2, 0.5, 0.8, 0.95]))
    return backbone.x0(role, sample, levels, backbone.encode(["seven", "three", "one", "two"]))


def student_of(backbone: Backbone) -> Cast:
    cast = Cast(backbone.denoiser, {})
    generator = torch.Generator().manual_seed(2)
    cast.add(Role.STUDENT, LoraPolicy(backbone.lora_targets, 4, 4.0), generator)
    return cast


def layer(pack: Pack, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    """(plain, packed)."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 128).to(dtype).requires_grad_(False)
    return plain, pack(copy.deepcopy(plain))


def change(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


PACKS = [
    pytest.param(packed_int8, 0.01, 0.52, marks=needs_torchao),
    pytest.param(packed_nf4, 0.12, 0.29, marks=needs_bitsandbytes),
]
"""Packing, largest relative change of a product, share of the weight's bytes in bf16."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pack", "bound", "share"), PACKS)
def test_a_packed_layer_is_near_and_small_and_keeps_nothing_for_backward(
    pack: Pack, bound: float, share: float, dtype: torch.dtype
) -> None:
    plain, packed = layer(pack, dtype)
    x = torch.randn(8, 256, dtype=dtype, generator=torch.Generator().manual_seed(1))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    results = []
    for one in (plain, packed):
        leaf = x.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = one(leaf)
        results.append((y, torch.autograd.grad(y.float().square().sum(), leaf)[0]))
    assert not any(tensor.is_floating_point() and tensor.numel() > 256 for tensor in kept)
    (y, gradient), (packed_y, packed_gradient) = results
    assert packed_y.dtype == dtype
    assert 0.0 < change(packed_y, y) < bound
    assert 0.0 < change(packed_gradient, gradient) < bound
    packed.register_parameter("bias", None)
    assert stored_bytes(packed) < share * 2 * 256 * 128


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@needs_torchao
def test_an_int8_layer_is_the_product_with_its_unpacked_weight() -> None:
    _, packed = layer(packed_int8, torch.float32)
    weight: Any = packed.weight
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = functional.linear(x, weight.dequantize(), packed.bias)
    assert torch.equal(packed(x), expected)
    (found,) = torch.autograd.grad(packed(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)
    leaf, tangent = x.detach(), torch.ones(3, 5, 256)
    moved = torch.func.jvp(packed, (leaf,), (tangent,))[1]
    expected = functional.linear(tangent, weight.dequantize())
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_a_packed_teacher_answers_nearly_the_same(kind: str, bound: float) -> None:
    plain = teacher()
    packed = teacher(kind)
    velocity = ask(plain) - ask_noise(plain)
    assert 0.0 < float((ask(packed) - ask(plain)).norm() / velocity.norm()) < bound
    assert packed.dtype == torch.float32
    names = {name for name, module in packed.denoiser.named_modules() if is_packed(module)}
    assert names
    assert all(name.startswith("transformer_blocks.") for name in names)


def ask_noise(backbone: Backbone) -> Tensor:
    """The sample that `ask` shows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, *backbone.latent_shape(), generator=generator)


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


@needs_torchao
def test_int8_halves_the_bytes_of_a_bf16_base_where_the_layers_are() -> None:
    plain, packed = (teacher(kind, torch.bfloat16).denoiser for kind in ("none", "int8"))
    ours = [m for m in packed.modules() if isinstance(m, Int8Linear)]
    unpacked = sum(2 * m.weight.numel() for m in ours)
    saved = stored_bytes(plain) - stored_bytes(packed)
    assert saved == pytest.approx(0.5 * unpacked, rel=0.15)  # one scale per row, rows are short


@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_adapters_learn_on_a_packed_base_and_nothing_else_does(kind: str, bound: float) -> None:
    backbone = teacher(kind)
    cast = student_of(backbone)
    target = ask(backbone).detach() + 0.5
    before = {
        name: [part.detach().clone() for part in stored_parts(parameter)]
        for name, parameter in backbone.denoiser.named_parameters()
    }
    trained = cast.parameters(Role.STUDENT)
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(15):
        loss = (ask(backbone, Role.STUDENT) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(0.25, rel=1e-4)  # a fresh adapter changes nothing
    assert losses[-1] < 0.5 * losses[0]
    adapters = {id(parameter) for parameter in trained}
    for name, parameter in backbone.denoiser.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapters), name
        if id(parameter) not in adapters:
            for part, its in zip(stored_parts(parameter), before[name], strict=True):
                assert torch.equal(part, its), name


@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_checkpointing_changes_no_gradient_of_a_packed_base(kind: str, bound: float) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        backbone = teacher(kind)
        cast = student_of(backbone)
        for parameter in cast.parameters(Role.STUDENT):
            generator = torch.Generator().manual_seed(3)
            parameter.data.normal_(generator=generator).mul_(0.1)
        if is_checkpointed:
            network: Any = backbone.denoiser
            network.enable_gradient_checkpointing(role_checkpoint)
            network.train()
        ask(backbone, Role.STUDENT).square().mean().backward()
        gradients.append([p.grad for p in cast.parameters(Role.STUDENT)])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-8)


@needs_torchao
def test_a_run_on_a_packed_base_leaves_a_plain_lora(tmp_path: Path) -> None:
    """Stock diffusers loads it onto the plain teacher, where it does something."""
    torch.manual_seed(0)
    pipe: Any = build_sd3(build_autoencoder())
    pipe.save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("seven\nthree\n", encoding="utf-8")
    config = config_for(tmp_path, tmp_path / "run", quantise="int8", budget=100, sample_every=0)
    result = train(config)
    pipe.load_lora_weights(result.adapter)
    backbone = wrap_pipeline(pipe, max_sequence_length=1)
    with_adapter = ask(backbone)
    pipe.unload_lora_weights()
    without = ask(backbone)
    assert torch.equal(without, ask(teacher()))
    assert change(with_adapter, without) > 1e-5


@pytest.mark.parametrize(
    ("pack", "module"),
    [(packed_int8, "torchao.quantization"), (packed_nf4, "bitsandbytes.nn")],
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, pack: Pack, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"is not installed; run: pip install .*\[quant\]"):
        pack(nn.Linear(8, 8))


def test_a_network_without_linear_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layers to quantise"):
        quantise(nn.Sequential(nn.Linear(4, 4)), "int8", CPU)
