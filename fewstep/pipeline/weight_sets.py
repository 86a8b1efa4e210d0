"""Several versions of some of a model's weights, one of them in place at a time.

A swap assigns tensors, it computes nothing. What was there first is kept as it was and comes back
exactly: by pointer where it still lies on the model's device, else from a copy in main memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
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
        check_weights_in_place(model)
        self._names = sorted({name for values in sets for name in values})
        self._parameters: dict[str, nn.Parameter] = {}
        self.look_up(model)
        for name, parameter in self._parameters.items():
            if not parameter.is_floating_point():
                raise PipelineError(
                    f"{name} is quantised ({parameter.dtype}), so an adapter cannot be merged into "
                    'it; use experts="adapters" and a file of plain LoRA'
                )
        self._first = {name: _kept(p.data) for name, p in self._parameters.items()}
        self._sets = [{**self._first, **values} for values in sets]
        self._current: int | None = None

    @property
    def count(self) -> int:
        """How many versions there are."""
        return len(self._sets)

    def look_up(self, model: nn.Module) -> None:
        """Find the parameters again; moving a model can make new ones. Once per image is enough."""
        self._parameters = {name: parameter_of(model, name) for name in self._names}

    def show(self, version: int | None) -> None:
        """Put one version in place (None: what was there first)."""
        if version == self._current:
            return
        values = self._first if version is None else self._sets[version]
        for name, parameter in self._parameters.items():
            value = values[name]
            if value.device != parameter.device or value.dtype != parameter.dtype:
                value = value.to(parameter.device, parameter.dtype, non_blocking=True)
                if version is not None:
                    values[name] = value
            parameter.data = value
        self._current = version


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter by the name it has without LoRA."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    owner: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return getattr(owner, kind)


def check_weights_in_place(model: nn.Module) -> None:
    """Refuse models whose weights are elsewhere between calls: what is written would be lost.

    Raises:
        PipelineError: Sequential or group offloading is on.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        kind = "sequential"
    elif _is_group_offload_enabled(model):
        kind = "group"
    else:
        return
    raise PipelineError(
        f"{kind} offloading keeps the weights of {type(model).__name__} elsewhere, so they cannot "
        'be exchanged between steps; use experts="adapters", or enable_model_cpu_offload()'
    )


def _kept(weight: Tensor) -> Tensor:
    if weight.device.type != "cuda":
        return weight
    kept = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
    return kept.copy_(weight)
