"""Experts as peft adapters, one of them active at a time: nothing is copied, nothing is merged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, final

from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer

from fewstep.errors import PipelineError
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import AdapterWeights, AttachedAdapter
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
from fewstep.pipeline.lora_layers import active_adapters, lora_layers
from fewstep.trajectory import PlannedStep


@final
class AdapterExperts(ExpertSwitch):
    """Each file is a peft adapter; a switch names another one in every layer.

    Other adapters of the user stay as they are in every phase. A compiled network gets one graph
    per expert.
    """

    def __init__(self, pipe: DiffusionPipeline, adapters: Sequence[AdapterWeights]) -> None:
        self._adapters = [adapter.attached for adapter in adapters]
        self._is_permanent = False
        self._names = frozenset(adapter.name for adapter in self._adapters)
        self._by_component = experts_by_component(adapters)
        self._models = models_of(pipe, adapters)
        self._with_lora = {
            adapter.attached.name: {
                part for part, weights in adapter.parts.items() if weights.ranks
            }
            for adapter in adapters
        }
        self._extras = ExtraWeights(self._models, adapters)
        self._current = {  # text encoders too; they have one adapter at most
            part: next(i for i, adapter in enumerate(adapters) if part in adapter.parts)
            for part in self._models
        }
        self._layers: dict[str, list[LoraLayer]] = {}
        self._put_on: list[str] = []
        try:
            for adapter in adapters:
                attached_adapter.attach(pipe, adapter)
                self._put_on.append(adapter.attached.name)
            self._look_up_layers()
            for component, index in self._current.items():
                self._switch(component, index)
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
        """Name the expert of this step in every layer, where another one is named."""
        if planned.expert is None:
            return
        component = self._adapters[planned.expert].component
        if self._current[component] != planned.expert:
            self._switch(component, planned.expert)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        check_same_models(pipe, self._models)
        self._look_up_layers()
        self._extras.look_up()
        if all(self._is_there(pipe, adapter) for adapter in self._adapters):
            return self._turn_on()
        raise PipelineError(
            "the few-step adapter was removed from this pipeline (unload_lora_weights removes "
            "all); unwrap() the pipeline and wrap it again, or fuse() before removing other LoRAs"
        )

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.fuse`."""
        check_one_per_network(self._adapters)
        attached_adapter.fuse(pipe)
        self._adapters = [replace(adapter, is_fused=True) for adapter in self._adapters]
        self._is_permanent = True

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._extras.remove()
        attached_adapter.detach(pipe, self._put_on)

    def _is_there(self, pipe: DiffusionPipeline, adapter: AttachedAdapter) -> bool:
        if adapter.is_fused or not self._with_lora[adapter.name]:
            return True
        if adapter.name in getattr(pipe, "fused_loras", ()):  # diffusers' own fuse_lora
            return True
        return all(
            any(adapter.name in layer.r for layer in self._layers[component])
            for component in self._with_lora[adapter.name]
        )

    def _look_up_layers(self) -> None:
        self._layers = {
            component: [
                layer
                for layer in lora_layers(model).values()
                if not self._names.isdisjoint(layer.r)
            ]
            for component, model in self._models.items()
        }

    def _turn_on(self) -> str | None:
        """Loading another LoRA, or `set_adapters`, leaves only what it names active."""
        is_off, is_disabled = False, False
        for component, layers in self._layers.items():
            index = self._current[component]
            wanted = {self._adapters[index].name}
            if len(self._by_component.get(component, ())) > 1:
                check_not_merged(layers, component)
            ours_on = [self._names.intersection(active_adapters(layer)) for layer in layers]
            if any(
                on != wanted & layer.r.keys() for on, layer in zip(ours_on, layers, strict=True)
            ):
                self._switch(component, index)
            is_off = is_off or (bool(layers) and not any(ours_on))
            is_disabled = is_disabled or any(cast(Any, la).disable_adapters for la in layers)
        if is_disabled:
            return DISABLED
        return was_off(sorted(self._names)) if is_off else None

    def _switch(self, component: str, index: int) -> None:
        self._current[component] = index
        _name_adapter(self._layers[component], self._adapters[index].name, self._names)
        self._extras.show(self._current)


def _name_adapter(layers: Sequence[LoraLayer], name: str, ours: frozenset[str]) -> None:
    for layer in layers:
        names = [other for other in active_adapters(layer) if other not in ours]
        if name in layer.r:
            names.append(name)
        # set_adapter does the same and walks over every tensor to set requires_grad, for 20 us a
        # layer; all of them are frozen here.
        cast(Any, layer)._active_adapter = names
