"""Experts as peft adapters, one of them active at a time: nothing is copied, nothing is merged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from diffusers import DiffusionPipeline

from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import AdapterWeights, AttachedAdapter
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
from fewstep.pipeline.our_layers import OurLayers, advice
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
        self._extras = ExtraWeights(self._models, adapters)
        self._current = {  # text encoders too; they have one adapter at most
            part: next(i for i, adapter in enumerate(adapters) if part in adapter.parts)
            for part in self._models
        }
        self._layers: dict[str, OurLayers] = {}
        self._put_on: list[str] = []
        try:
            for adapter in adapters:
                attached_adapter.attach(pipe, adapter)
                self._put_on.append(adapter.attached.name)
            for component, model in self._models.items():
                self._layers[component] = OurLayers(model, self._names)
                self._switch(component, self._current[component])
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
        self._extras.check_in_place()
        if self._is_permanent or was_fused(pipe, self._names, self._by_component):
            return None
        conditions = [
            layers.put_right(
                self._adapters[self._current[component]].name,
                component=component,
                takes_turns=len(self._by_component.get(component, ())) > 1,
            )
            for component, layers in self._layers.items()
        ]
        return advice(conditions, sorted(self._names))

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.fuse`."""
        check_one_per_network(self._adapters)
        attached_adapter.fuse(pipe)
        self._adapters = [replace(adapter, is_fused=True) for adapter in self._adapters]
        self._is_permanent = True

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._extras.remove()
        log_merged(pipe, self._layers, self._put_on)
        attached_adapter.detach(pipe, self._put_on)

    def _switch(self, component: str, index: int) -> None:
        self._current[component] = index
        self._layers[component].turn_on(self._adapters[index].name)
        self._extras.show(self._current)
