"""LoRA layers that read their role, and the bank that owns all adapters of one base.

    output = base(x) + (alpha / rank) * up[role](down[role](x))        teacher: base(x) alone

One frozen base serves every role. Adapters are float32 whatever the base's precision.
Names in and out are PEFT's: `<module>.lora_A.weight`, `<module>.lora_B.weight`.

Source:
    Hu et al. 2021, arXiv:2106.09685.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import AdapterError, ConfigError
from fewstep.trainer.roles import Role, current_role


class RoleLayer(nn.Module, ABC):
    """Interface: a frozen layer with one low-rank update per role.

    Args:
        base: The layer to wrap; frozen by `attach`.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.scales: dict[str, float] = {}

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code that asks a layer for its dtype finds it here."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @abstractmethod
    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of down and up."""

    @abstractmethod
    def update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What the adapter adds to the base's output, before alpha / rank."""

    def add(self, role: Role, rank: int, alpha: float, generator: torch.Generator) -> None:
        """A new adapter: random down, zero up, so it changes nothing yet."""
        down_shape, up_shape = self.shapes(rank)
        bound = math.sqrt(3.0 / math.prod(down_shape[1:]))
        down = torch.empty(down_shape).uniform_(-bound, bound, generator=generator)
        device = self.base.weight.device
        self.down[role.value] = nn.Parameter(down.to(device))
        self.up[role.value] = nn.Parameter(torch.zeros(up_shape, device=device))
        self.scales[role.value] = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus the current role's update; in the dtype of the base."""
        output = self.base(x)
        role = current_role().value
        if role not in self.down:
            return output
        down, up = self.down[role].to(x.dtype), self.up[role].to(x.dtype)
        return output + self.scales[role] * self.update(x, down, up)


class RoleLinear(RoleLayer):
    """`RoleLayer` of an nn.Linear: down (rank, in), up (out, rank)."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self.base.weight.shape
        return (rank, in_features), (out_features, rank)

    def update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, down), up)


class RoleConv2d(RoleLayer):
    """`RoleLayer` of an nn.Conv2d: down has the base's kernel, up is 1x1."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__(base)
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ConfigError(
                "LoRA on grouped or non-zero-padded convolutions is not supported; "
                "leave them out of lora.targets"
            )
        self.stride, self.padding, self.dilation = base.stride, base.padding, base.dilation

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, *kernel = self.base.weight.shape
        return (rank, *kernel), (out_channels, rank, 1, 1)

    def update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        low = functional.conv2d(x, down, None, self.stride, self.padding, self.dilation)
        return functional.conv2d(low, up)


@dataclass(frozen=True, slots=True)
class LoraBank:
    """All adapters of one frozen base.

    Attributes:
        layers: Module path in the base -> the role layer now in its place.
    """

    layers: Mapping[str, RoleLayer]

    def add(self, role: Role, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Give a role its adapter on every layer; it changes nothing until trained."""
        for layer in self.layers.values():
            layer.add(role, rank, alpha, generator)

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The role's parameters, in a fixed order."""
        return [parameter for _, parameter in self._named(role)]

    def _named(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in self.layers.items():
            yield f"{path}.lora_A.weight", layer.down[role.value]
            yield f"{path}.lora_B.weight", layer.up[role.value]

    def tensors(self, role: Role) -> dict[str, Tensor]:
        """PEFT names -> the role's tensors (detached, not copied)."""
        return {name: parameter.detach() for name, parameter in self._named(role)}

    @torch.no_grad()
    def load(self, role: Role, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite a role's tensors.

        Raises:
            AdapterError: Names or shapes differ from the bank's.
        """
        mine = dict(self._named(role))
        if set(mine) != set(tensors):
            odd = sorted(set(mine) ^ set(tensors))
            raise AdapterError(
                f"adapter tensors do not match this base: {len(odd)} differ, "
                f"the first is {odd[0]}; train on the same model and lora.targets"
            )
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise AdapterError(
                    f"{name} has shape {tuple(tensors[name].shape)}, wanted "
                    f"{tuple(parameter.shape)}; use the lora.rank the file was trained with"
                )
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def blend(self, target: Role, source: Role, keep: float) -> None:
        """`target = keep * target + (1 - keep) * source`: EMA, and IDA's critic pull."""
        pairs = zip(self.parameters(target), self.parameters(source), strict=True)
        for mine, other in pairs:
            mine.lerp_(other, 1.0 - keep)


def attach(model: nn.Module, targets: Iterable[str]) -> LoraBank:
    """Freeze a model and put a role layer in place of every linear or conv layer that matches.

    Args:
        model: The base denoiser, changed in place.
        targets: Regular expressions; a layer is taken when one of them is found in its path.

    Returns:
        The bank, still without adapters.

    Raises:
        ConfigError: A pattern matches no layer.
    """
    model.requires_grad_(False)
    patterns = {text: re.compile(text) for text in targets}
    unused = set(patterns)
    layers: dict[str, RoleLayer] = {}
    for path, module in list(model.named_modules()):
        hits = [text for text, pattern in patterns.items() if pattern.search(path)]
        if not hits or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        unused.difference_update(hits)
        parent, _, name = path.rpartition(".")
        layer = RoleLinear(module) if isinstance(module, nn.Linear) else RoleConv2d(module)
        model.get_submodule(parent).register_module(name, layer)
        layers[path] = layer
    if unused:
        raise ConfigError(
            f"lora.targets {sorted(unused)} match no linear or conv layer of "
            f"{type(model).__name__}; see model.named_modules()"
        )
    return LoraBank(layers)
