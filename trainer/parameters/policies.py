"""How a role is parameterised: which layers it changes, and how."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewstep.errors import ConfigError
from fewstep.trainer.parameters.lora import Base, LoraUpdate, RoleLayer, Update
from fewstep.trainer.parameters.lorad import LoradUpdate


class ParameterPolicy(ABC):  # noqa: B024 two interfaces below have nothing in common to call
    """Interface: makes a role's parameters on a base network."""


class UpdatePolicy(ParameterPolicy):
    """Interface: the role is an update of some layers of the shared base."""

    targets: tuple[str, ...]

    @abstractmethod
    def update(self, base: Base, generator: torch.Generator) -> Update | None:
        """A fresh update of one layer; None where this kind cannot change it."""


@dataclass(frozen=True, slots=True)
class LoraPolicy(UpdatePolicy):
    """Low-rank adapters.

    Attributes:
        targets: Regular expressions of the layers.
        rank: Of every adapter.
        alpha: Multiplied by alpha / rank.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float

    def update(self, base: Base, generator: torch.Generator) -> Update:
        return LoraUpdate(base, self.rank, self.alpha, generator)


@dataclass(frozen=True, slots=True)
class LoradPolicy(UpdatePolicy):
    """Low-rank rotations of column pairs (WaDi); linear layers with even input only.

    Attributes:
        targets: Regular expressions of the layers; convolutions among them are left alone.
        rank: Of every rotation.
    """

    targets: tuple[str, ...]
    rank: int

    def update(self, base: Base, generator: torch.Generator) -> Update | None:
        if not isinstance(base, nn.Linear) or base.in_features % 2:
            return None
        return LoradUpdate(base, self.rank, generator)


@dataclass(frozen=True, slots=True)
class FullPolicy(ParameterPolicy):
    """A copy of the whole network, trained in float32.

    Attributes:
        trainable: Regular expressions of the parameters that are trained; empty trains all.
    """

    trainable: tuple[str, ...] = ()

    def network(self, base: nn.Module) -> nn.Module:
        """The role's network: the base as it was before any adapter was put on it."""
        network = without_updates(copy.deepcopy(base)).float()
        patterns = [re.compile(text) for text in self.trainable]
        found = False
        for name, parameter in network.named_parameters():
            is_trained = not patterns or any(p.search(name) for p in patterns)
            parameter.requires_grad_(is_trained)
            found = found or is_trained
        if not found:
            raise ConfigError(
                f"no parameter of {type(base).__name__} matches {list(self.trainable)}; "
                "see model.named_parameters()"
            )
        return network


@dataclass(frozen=True, slots=True)
class SmallerPolicy(ParameterPolicy):
    """A shallower copy: evenly spaced blocks of the base are kept, the rest dropped.

    Attributes:
        blocks: Path of the list of blocks, such as "transformer_blocks".
        keep: How many of them stay.
    """

    blocks: str
    keep: int

    def network(self, base: nn.Module) -> nn.Module:
        """The role's network, all of it trained in float32."""
        kept = self.kept(base)
        network = without_updates(copy.deepcopy(base)).float()
        blocks = network.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        network.get_submodule(self.blocks.rpartition(".")[0]).register_module(
            self.blocks.rpartition(".")[2], nn.ModuleList(blocks[i] for i in kept)
        )
        model: Any = network
        if "num_layers" in model.config:  # so that it can be saved and loaded as what it is
            model.register_to_config(num_layers=self.keep)
        return network.requires_grad_(True)

    def kept(self, base: nn.Module) -> list[int]:
        """Which blocks of the base stay; the last one always does, the first where two do.

        Raises:
            ConfigError: The base has no such list of blocks, or too few.
        """
        parts = dict(base.named_modules())
        blocks = parts.get(self.blocks)
        if not isinstance(blocks, nn.ModuleList) or not 1 <= self.keep <= len(blocks):
            raise ConfigError(
                f"{self.blocks!r} of {type(base).__name__} is no list of at least {self.keep} "
                "blocks; name one such as transformer_blocks, and keep fewer"
            )
        if self.keep == 1:
            return [len(blocks) - 1]
        # first and last border on what the base learned around them
        return [round(i * (len(blocks) - 1) / (self.keep - 1)) for i in range(self.keep)]


def without_updates(network: nn.Module) -> nn.Module:
    """Put the plain layers back in place of adapted ones, in place."""
    for path, module in list(network.named_modules()):
        if isinstance(module, RoleLayer):
            parent, _, name = path.rpartition(".")
            network.get_submodule(parent).register_module(name, module.base)
    return network


def matching_layers(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Paths of the linear and conv layers in whose path one of the expressions is found.

    Raises:
        ConfigError: An expression matches no layer.
    """
    patterns = {text: re.compile(text) for text in targets}
    unused, paths = set(patterns), []
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | RoleLayer) or _is_inside(path):
            continue
        hits = [text for text, pattern in patterns.items() if pattern.search(path)]
        unused.difference_update(hits)
        if hits:
            paths.append(path)
    if unused:
        raise ConfigError(
            f"lora.targets {sorted(unused)} match no linear or conv layer of "
            f"{type(network).__name__}; see model.named_modules()"
        )
    return paths


def _is_inside(path: str) -> bool:
    return path.endswith(".base") or ".updates." in path
