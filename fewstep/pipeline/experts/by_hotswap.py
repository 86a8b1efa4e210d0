"""Experts that take turns in one LoRA slot, whose tensors are overwritten in place.

Shapes, names and scales stay the same, so a network compiled with `torch.compile` is compiled once
and serves every expert (peft calls this hotswapping).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import ADAPTER_NAME, AdapterWeights, AttachedAdapter
from fewstep.pipeline.experts.switch import (
    DISABLED,
    ExpertSwitch,
    check_not_merged,
    check_one_per_network,
    check_same_models,
    experts_by_component,
    models_of,
    was_off,
)
from fewstep.pipeline.extras import ExtraWeights
from fewstep.pipeline.lora_layers import (
    LoraWeights,
    activate,
    active_adapters,
    layers_with,
)
from fewstep.pipeline.weight_sets import check_weights_in_place
from fewstep.trajectory import PlannedStep


@final
class HotswapExperts(ExpertSwitch):
    """One adapter in every layer that any expert changes, as wide as the widest expert.

    An expert of a smaller rank is padded with zeros, one that leaves a layer alone is zero there;
    alpha / rank is multiplied into the up matrices, so that the slot's own scale never changes.
    """

    def __init__(self, pipe: DiffusionPipeline, adapters: Sequence[AdapterWeights]) -> None:
        for adapter in adapters:
            _check_is_plain(adapter)
        self._adapters = [replace(adapter.attached, name=ADAPTER_NAME) for adapter in adapters]
        self._is_permanent = False
        self._by_component = experts_by_component(adapters)
        self._models = models_of(pipe, adapters)
        for model in self._models.values():
            check_weights_in_place(model)
        self._extras = ExtraWeights(self._models, adapters)
        self._slots: dict[str, list[Tensor]] = {}
        self._sets: dict[str, dict[int, list[Tensor]]] = {}
        self._current: dict[str, int] = {}
        attached_adapter.check_name_is_free(pipe, ADAPTER_NAME)
        try:
            for component in self._models:
                mine = [i for i, adapter in enumerate(adapters) if component in adapter.parts]
                self._add_slot(pipe, component, {i: adapters[i] for i in mine})
                self._switch(component, mine[0])
        except BaseException:
            self.remove(pipe)
            raise

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on, in the order of the recipe's experts."""
        return tuple(self._adapters)

    @property
    def is_permanent(self) -> bool:
        """Whether `fuse` was called."""
        return self._is_permanent

    def before_call(self, planned: PlannedStep) -> None:
        """Overwrite the slot with this step's expert."""
        if planned.expert is None:
            return
        component = self._adapters[planned.expert].component
        if self._current[component] != planned.expert:
            self._switch(component, planned.expert)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        check_same_models(pipe, self._models)
        if self._is_permanent:
            return None
        self._extras.look_up()
        is_off, is_disabled = False, False
        for component, model in self._models.items():
            layers = list(layers_with(model, ADAPTER_NAME).values())
            if self._slots[component] and not layers:
                raise PipelineError(
                    "the few-step adapter was removed from this pipeline (unload_lora_weights "
                    "removes all); unwrap() the pipeline and wrap it again"
                )
            if len(self._by_component.get(component, ())) > 1:
                check_weights_in_place(model)
                check_not_merged(layers, component)
            for layer in layers:
                names = active_adapters(layer)
                is_disabled = is_disabled or bool(layer.disable_adapters)
                if ADAPTER_NAME not in names:
                    activate(layer, [*names, ADAPTER_NAME])
                    is_off = True
            # pipe.to() made new tensors of the slot
            self._slots[component] = _slot_tensors(model)
        if is_disabled:
            return DISABLED
        return was_off([ADAPTER_NAME]) if is_off else None

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.fuse`."""
        check_one_per_network(self._adapters)
        attached_adapter.fuse(pipe)
        self._adapters = [replace(adapter, is_fused=True) for adapter in self._adapters]
        self._is_permanent = True

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._extras.remove()
        attached_adapter.detach(pipe, [ADAPTER_NAME])

    def _add_slot(
        self, pipe: DiffusionPipeline, component: str, adapters: Mapping[int, AdapterWeights]
    ) -> None:
        model = self._models[component]
        parts = {index: adapter.parts[component] for index, adapter in adapters.items()}
        ranks: dict[str, int] = {}
        for weights in parts.values():
            for module, rank in weights.ranks.items():
                ranks[module] = max(rank, ranks.get(module, 0))
        shapes = _padded_shapes(ranks, list(parts.values()))
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        slot = LoraWeights(zeros, ranks, {module: float(rank) for module, rank in ranks.items()})
        first = next(iter(adapters.values()))
        one = AdapterWeights(
            replace(first.attached, name=ADAPTER_NAME, component=component, scale=1.0),
            {component: slot},
        )
        attached_adapter.attach(pipe, one)
        self._slots[component] = _slot_tensors(model)
        order = [name for name, _ in _slot_parameters(model)]
        self._sets[component] = {
            index: [
                _padded(weights, name, shapes[name], adapters[index].attached.scale)
                for name in order
            ]
            for index, weights in parts.items()
        }

    def _switch(self, component: str, index: int) -> None:
        slots, values = self._slots[component], self._sets[component][index]
        for position, slot in enumerate(slots):
            if values[position].device != slot.device or values[position].dtype != slot.dtype:
                values[position] = values[position].to(slot.device, slot.dtype)
        with torch.no_grad():
            if slots:
                torch._foreach_copy_(slots, values)
        self._current[component] = index
        self._extras.show(self._current)


def _slot_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The slot's tensors under the names that adapter files have, always in the same order."""
    found = []
    for path, layer in layers_with(model, ADAPTER_NAME).items():
        matrices: dict[str, Any] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
        for kind, modules in matrices.items():
            found.append((f"{path}.{kind}.weight", modules[ADAPTER_NAME].weight))
    return sorted(found, key=lambda pair: pair[0])


def _slot_tensors(model: nn.Module) -> list[Tensor]:
    return [parameter.data for _, parameter in _slot_parameters(model)]


def _padded_shapes(
    ranks: Mapping[str, int], parts: Sequence[LoraWeights]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for weights in parts:
        for name, tensor in weights.tensors.items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            rank, sizes = ranks[module], tuple(tensor.shape)
            is_down = kind == "lora_A"
            shapes[name] = (rank, *sizes[1:]) if is_down else (sizes[0], rank, *sizes[2:])
    return shapes


def _padded(weights: LoraWeights, name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    padded = torch.zeros(shape)
    tensor = weights.tensors.get(name)
    if tensor is None:
        return padded
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    rank = weights.ranks[module]
    if kind == "lora_A":
        padded[:rank] = tensor.float()
    else:
        padded[:, :rank] = scale * weights.alphas[module] / rank * tensor.float()
    return padded


def _check_is_plain(adapter: AdapterWeights) -> None:
    if any(weights.is_dora for weights in adapter.parts.values()):
        raise AdapterError(
            f"{adapter.attached.path}: is a DoRA, whose magnitudes cannot share a slot; use "
            'experts="adapters" or experts="fused"'
        )
