"""A frozen base in fewer bits: the linear layers of its blocks, packed as they are moved.

int8: one scale per output row, by torchao. nf4: 4-bit normal floats, by bitsandbytes. Embedders,
norms, convolutions and the last projection stay as they are: they are few and matter most.
"""

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from fewstep.errors import ConfigError, MissingExtraError
from fewstep.trainer.sharding import blocks_of

EXTRA = "quant"


def quantise(network: nn.Module, kind: Literal["int8", "nf4"], device: torch.device) -> None:
    """Pack the linear layers in a network's blocks, in place, and move it all to a device.

    Layers are moved and packed one by one, so the device never holds the whole network unpacked.

    Args:
        network: Frozen, on the CPU, before any role is added.
        kind: How.
        device: Where to.

    Raises:
        ConfigError: It has no linear layer in a block.
        MissingExtraError: The library that packs is not installed.
    """
    pack = packed_int8 if kind == "int8" else packed_nf4
    found = False
    for block in blocks_of(network):
        for path, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:  # subclasses are read by code that wants plain weights
                parent, _, name = path.rpartition(".")
                block.get_submodule(parent).register_module(name, pack(layer.to(device)))
                found = True
    if not found:
        raise ConfigError(
            f"{type(network).__name__} has no linear layers to quantise; set quantise to none"
        )
    network.to(device)


@final
class Int8Linear(nn.Linear):
    """A frozen layer whose weight is packed; what autograd keeps of it is the packed weight.

    torchao's own product keeps the unpacked weight of every layer for the backward pass, which is
    more than was saved.
    """

    def forward(self, input: Tensor) -> Tensor:
        packed: Any = self.weight
        return _PackedProduct.apply(input, packed.dequantize, self.bias)


@final
class _PackedProduct(Function):
    """`x @ unpacked(weight).T + bias`, differentiable in x, backward and forward."""

    @staticmethod
    def forward(x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        return functional.linear(x, unpack(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.unpack = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return gradients[0] @ ctx.unpack(), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return functional.linear(tangents[0], ctx.unpack())


def packed_int8(layer: nn.Linear) -> nn.Linear:
    """The layer in 8 bits.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("torchao", EXTRA) from error
    quantize_(layer, Int8WeightOnlyConfig())
    has_bias = layer.bias is not None
    packed = Int8Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    packed.weight, packed.bias = layer.weight, layer.bias
    return packed.requires_grad_(False)


def packed_nf4(layer: nn.Linear) -> nn.Linear:
    """The layer in 4 bits, its scales in 8.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", EXTRA) from error
    packed = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.detach()
    make: Any = Params4bit  # its constructor is Tensor's to a type checker
    packed.weight = make(weight, requires_grad=False, quant_type="nf4", module=packed)
    packed.bias = layer.bias
    return packed.to(weight.device).requires_grad_(False)  # moving it packs it


def stored_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters as they are stored: packed ones with their scales."""
    parts = [part for p in network.parameters() for part in stored_parts(p)]
    return sum(part.numel() * part.element_size() for part in parts)


def stored_parts(parameter: Any) -> list[Tensor]:
    """What lies in memory for a parameter: itself, or its packed numbers and their scales."""
    kind = type(parameter).__name__  # by name: neither library needs to be there
    if kind == "Int8Tensor":
        return [parameter.qdata, parameter.scale, parameter.zero_point]
    if kind == "Params4bit":
        state = parameter.quant_state
        return [parameter, state.absmax, state.code, state.state2.absmax, state.state2.code]
    return [parameter]
