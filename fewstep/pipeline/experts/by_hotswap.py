"""Experts that take turns in one LoRA slot, whose tensors are overwritten in place.

Shapes, names and scales stay the same, so a network compiled with `torch.compile` is compiled once
and serves every expert (peft calls this hotswapping).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import AdapterError
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import ADAPTER_NAME, AdapterWeights, AttachedAdapter
from fewstep.pipeline.experts.switch import (
    ExpertSwitch,
    check_one_per_network,
    check_same_models,
    experts_by_component,
    log_merged,
    models_of,
    was_fused,
)
from fewstep.pipeline.extras import ExtraWeights
from fewstep.pipeline.lora_layers import LoraWeights, layers_with
from fewstep.pipeline.our_layers import OurLayers, advice
from fewstep.pipeline.weight_sets import OffloadGuard
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
        self._guards = {part: OffloadGuard(model) for part, model in self._models.items()}
        for part, guard in self._guards.items():
            guard.check(self._models[part].parameters())
        self._extras = ExtraWeights(self._models, adapters)
        self._layers: dict[str, OurLayers] = {}
        self._slots: dict[str, list[dict[str, Any]]] = {}
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
        if planned.expert is not None:
            self.turn_to(planned.expert)

    def turn_to(self, index: int) -> None:
        """See `ExpertSwitch.turn_to`."""
        component = self._adapters[index].component
        if self._current[component] != index:
            self._switch(component, index)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        check_same_models(pipe, self._models)
        if self._is_permanent or was_fused(pipe, {ADAPTER_NAME}, self._by_component):
            return None
        self._extras.check_in_place()
        conditions = []
        for component, layers in self._layers.items():
            takes_turns = len(self._by_component.get(component, ())) > 1
            conditions.append(
                layers.put_right(ADAPTER_NAME, component=component, takes_turns=takes_turns)
            )
            if takes_turns:
                self._guards[component].check(p["weight"] for p in self._slots[component])
        return advice(conditions, [ADAPTER_NAME])

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.fuse`."""
        check_one_per_network(self._adapters)
        attached_adapter.fuse(pipe)
        self._adapters = [replace(adapter, is_fused=True) for adapter in self._adapters]
        self._is_permanent = True

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._extras.remove()
        log_merged(pipe, self._layers, [ADAPTER_NAME])
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
        layers = self._layers[component] = OurLayers(model, frozenset({ADAPTER_NAME}))
        self._slots[component] = _slot_of(layers)
        order = _slot_names(model, layers)
        self._sets[component] = {
            index: [
                _padded(weights, name, shapes[name], adapters[index].attached.scale)
                for name in order
            ]
            for index, weights in parts.items()
        }

    def _switch(self, component: str, index: int) -> None:
        slot = [place["weight"] for place in self._slots[component]]
        values = self._sets[component][index]
        for position, tensor in enumerate(slot):
            if values[position].device != tensor.device or values[position].dtype != tensor.dtype:
                values[position] = values[position].to(tensor.device, tensor.dtype)
        if slot:
            with torch.no_grad():
                torch._foreach_copy_(slot, values)
        self._current[component] = index
        self._extras.show(self._current)


def _slot_of(layers: OurLayers) -> list[dict[str, Any]]:
    """Where the slot's tensors are: down and up of each layer, in the order of the layers.

    The dictionaries stay when a pipeline is moved; the tensors in them may not.
    """
    return [
        cast(Any, matrices)[ADAPTER_NAME]._parameters
        for layer in layers.layers
        for matrices in (layer.lora_A, layer.lora_B)
    ]


def _slot_names(model: nn.Module, layers: OurLayers) -> list[str]:
    """The same tensors under the names that adapter files have."""
    paths = {id(layer): path for path, layer in layers_with(model, ADAPTER_NAME).items()}
    return [
        f"{paths[id(layer)]}.{kind}.weight"
        for layer in layers.layers
        for kind in ("lora_A", "lora_B")
    ]


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
