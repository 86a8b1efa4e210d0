"""Several versions of some of a model's weights, one of them in place at a time.

A swap assigns tensors, it computes nothing. What was there first is kept as it was and comes back
exactly: by pointer where it still lies on the model's device, else from a copy in main memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, final

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.errors import PipelineError


@final
class WeightSets:
    """Versions of a model's weights.

    Sets stay on the device on which they were used last, so that a swap on a GPU copies nothing;
    with n sets the GPU holds the swapped weights n times. The first weights go to pinned memory.

    Args:
        model: Whose weights they are.
        sets: Parameter name (as without LoRA) -> whole new value, one mapping per version.

    Raises:
        PipelineError: Weights are quantised, or kept elsewhere by sequential or group offloading.
    """

    def __init__(self, model: nn.Module, sets: Sequence[Mapping[str, Tensor]]) -> None:
        names = sorted({name for values in sets for name in values})
        # The module that owns a weight stays the same under LoRA; its parameter may be replaced.
        self._owners = {name: owner_of(model, name) for name in names}
        self._guard = OffloadGuard(model)
        self.check_in_place()
        first = {name: self._parameter(name).data for name in names}
        for name, weight in first.items():
            if not weight.is_floating_point():
                raise PipelineError(
                    f"{name} is quantised ({weight.dtype}), so an adapter cannot be merged into "
                    'it; use experts="adapters" and a file of plain LoRA'
                )
        self._first = {name: _kept(weight) for name, weight in first.items()}
        self._sets = [{**self._first, **values} for values in sets]
        self._current: int | None = None

    @property
    def count(self) -> int:
        """How many versions there are."""
        return len(self._sets)

    def check_in_place(self) -> None:
        """Refuse to write weights that offloading keeps elsewhere.

        Raises:
            PipelineError: It does.
        """
        self._guard.check(self._parameter(name) for name in self._owners)

    def show(self, version: int | None) -> None:
        """Put one version in place (None: what was there first)."""
        if version == self._current:
            return
        values = self._first if version is None else self._sets[version]
        for name, value in values.items():
            parameter = self._parameter(name)
            if value.device != parameter.device or value.dtype != parameter.dtype:
                value = value.to(parameter.device, parameter.dtype, non_blocking=True)
                if version is not None:
                    values[name] = value
            parameter.data = value
        self._current = version

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = self._owners[name]._parameters[name.rpartition(".")[2]]
        assert parameter is not None
        return parameter


@final
class OffloadGuard:
    """Notices offloading that keeps a model's weights elsewhere: what is written would be lost.

    diffusers' own question walks over the model for milliseconds; this one is asked per image.

    Args:
        model: The model, without LoRA of ours.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._modules = tuple(model.modules())

    def check(self, weights: Iterable[Tensor]) -> None:
        """Ask.

        Args:
            weights: What is going to be written.

        Raises:
            PipelineError: Sequential or group offloading is on.
        """
        if any(_has_group_hook(module) for module in self._modules):
            kind = "group"
        elif any(weight.is_meta for weight in weights):
            kind = "sequential"
        else:
            return
        raise PipelineError(
            f"{kind} offloading keeps the weights of {self._name} elsewhere, so they cannot be "
            'exchanged between steps; use experts="adapters", or enable_model_cpu_offload()'
        )


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module whose parameter this is, by the name it has without LoRA."""
    module = model.get_submodule(name.rpartition(".")[0])
    return cast(nn.Module, module.get_base_layer()) if isinstance(module, LoraLayer) else module


def _has_group_hook(module: nn.Module) -> bool:
    registry: Any = module.__dict__.get("_diffusers_hook")
    return registry is not None and registry.get_hook(_GROUP_OFFLOADING) is not None


def _kept(weight: Tensor) -> Tensor:
    if weight.device.type != "cuda":
        return weight
    kept = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
    return kept.copy_(weight)
