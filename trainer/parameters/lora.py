"""Adapted layers: one frozen layer, and what each role adds to it.

    output = base(x) + scale * (alpha / rank) * up(down(x))        a role without update: base(x)

Adapters are float32 whatever the base's precision. Tensor names are PEFT's: `lora_A.weight` (down)
and `lora_B.weight` (up).

Source:
    Hu et al. 2021, arXiv:2106.09685.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ConfigError
from fewstep.trainer.roles import current_role

Base = nn.Linear | nn.Conv2d


class Update(nn.Module, ABC):
    """Interface: what one role changes in one layer."""

    @abstractmethod
    def apply_to(self, base: Base, x: Tensor, scale: float) -> Tensor:
        """The layer's output under this role, in the dtype of the base."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters with their names in a file, in a fixed order."""


class LoraUpdate(Update):
    """Low-rank update of a linear or convolution layer; changes nothing until trained.

    Args:
        base: The layer.
        rank: Rows of `down`.
        alpha: The update is multiplied by alpha / rank.
        generator: Source of the random `down`, on the CPU; `up` starts at zero.
    """

    def __init__(self, base: Base, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        if isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
            raise ConfigError(
                "LoRA on grouped or non-zero-padded convolutions is not supported; "
                "leave them out of lora.targets"
            )
        is_linear = isinstance(base, nn.Linear)  # asked for its sizes: a packed weight has others
        shape = (base.out_features, base.in_features) if is_linear else base.weight.shape
        out_size, *rest = shape
        bound = math.sqrt(3.0 / math.prod(rest))
        down = torch.empty(rank, *rest).uniform_(-bound, bound, generator=generator)
        up_shape = (out_size, rank) if is_linear else (out_size, rank, 1, 1)
        device = base.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(up_shape, device=device))
        self.scale = alpha / rank

    def apply_to(self, base: Base, x: Tensor, scale: float) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(base, nn.Linear):
            low = functional.linear(functional.linear(x, down), up)
        else:
            low = functional.conv2d(x, down, None, base.stride, base.padding, base.dilation)
            low = functional.conv2d(low, up)
        return base(x) + (scale * self.scale) * low

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "lora_A.weight", self.down
        yield "lora_B.weight", self.up


class RoleLayer(nn.Module):
    """A frozen layer with one update per role.

    Args:
        base: The layer to wrap.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()
        if isinstance(base, nn.Conv2d):  # model code asks its layers for these
            self.stride, self.padding, self.dilation = base.stride, base.padding, base.dilation

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code that asks a layer for its dtype finds it here."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def out_features(self) -> int:
        """Width of the output: heads on a time embedding ask for it."""
        return self.base.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """The base's output under the current role."""
        role = current_role()
        if role.scale == 0.0 or role.name not in self.updates:
            return self.base(x)
        update = self.updates[role.name]
        assert isinstance(update, Update)
        return update.apply_to(self.base, x, role.scale)
