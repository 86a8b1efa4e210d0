"""Experts merged into full weights, exchanged whole: no LoRA arithmetic while sampling."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, final

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import AdapterError
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import AdapterWeights, AttachedAdapter
from fewstep.pipeline.experts.switch import (
    ExpertSwitch,
    check_one_per_network,
    check_same_models,
    models_of,
)
from fewstep.pipeline.extras import whole_extras
from fewstep.pipeline.lora_layers import layers_with, offloading_paused
from fewstep.pipeline.our_layers import (
    LayerPlace,
    check_none_merged,
    is_any_merged,
    layer_place,
    merged_error,
)
from fewstep.pipeline.weight_sets import OffloadGuard, WeightSets
from fewstep.trajectory import PlannedStep


@final
class FusedExperts(ExpertSwitch):
    """Each expert has its own copy of the weights it changes; a switch exchanges pointers.

    Fastest while sampling; the changed weights lie in memory once per expert, and once more as
    they were. LoRAs of the user stay LoRAs on top and reach every phase.
    """

    def __init__(self, pipe: DiffusionPipeline, adapters: Sequence[AdapterWeights]) -> None:
        self._adapters = [replace(adapter.attached, is_fused=True) for adapter in adapters]
        self._is_permanent = False
        self._models = models_of(pipe, adapters)
        for model in self._models.values():
            OffloadGuard(model).check(model.parameters())
        merged = [self._merged(pipe, adapter) for adapter in adapters]
        self._sets: dict[str, WeightSets] = {}
        self._version: dict[str, dict[int, int]] = {}
        self._places: dict[str, list[LayerPlace]] = {}
        for component, model in self._models.items():
            mine = [index for index, values in enumerate(merged) if component in values]
            self._sets[component] = WeightSets(model, [merged[i][component] for i in mine])
            self._version[component] = {index: version for version, index in enumerate(mine)}
            parts = [adapters[i].parts[component] for i in mine]
            paths = sorted({path for part in parts for path in (*part.ranks, *part.rotations)})
            self._places[component] = [layer_place(model, path) for path in paths]
        for sets in self._sets.values():  # all of them could be made: now the pipeline changes
            sets.show(0)

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on, in the order of the recipe's experts."""
        return tuple(self._adapters)

    @property
    def is_permanent(self) -> bool:
        """Whether `fuse` was called."""
        return self._is_permanent

    def before_call(self, planned: PlannedStep) -> None:
        """Put the weights of this step's expert in place."""
        if planned.expert is not None:
            self.turn_to(planned.expert)

    def turn_to(self, index: int) -> None:
        """See `ExpertSwitch.turn_to`."""
        component = self._adapters[index].component
        self._sets[component].show(self._version[component][index])

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`; weights cannot be switched off."""
        check_same_models(pipe, self._models)
        for component, sets in self._sets.items():
            if sets.count > 1:
                sets.check_in_place()
                if is_any_merged(self._places[component]):
                    raise merged_error(component)
        return None

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.fuse`."""
        check_one_per_network(self._adapters)
        attached_adapter.fuse(pipe)
        self._is_permanent = True

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        for component, sets in self._sets.items():
            sets.check_in_place()
            check_none_merged(component, self._places[component])
        for sets in self._sets.values():
            sets.show(None)

    def _merged(
        self, pipe: DiffusionPipeline, adapter: AdapterWeights
    ) -> dict[str, dict[str, Tensor]]:
        """Component -> whole weights with this adapter in them; the pipeline stays as it was."""
        name = adapter.attached.name
        attached_adapter.attach(pipe, adapter)
        try:
            found = {}
            for component in adapter.parts:
                model = self._models[component]
                merged = _merged_weights(model, name, adapter)
                found[component] = merged | whole_extras(model, adapter, component, merged)
            return found
        finally:
            with offloading_paused(pipe):
                attached_adapter.detach(pipe, [name])


def _merged_weights(model: nn.Module, name: str, adapter: AdapterWeights) -> dict[str, Tensor]:
    merged = {}
    for path, layer in layers_with(model, name).items():
        base: Any = layer.get_base_layer()
        before = base.weight.data
        merged_before = list(layer.merged_adapters)
        try:
            cast(Any, layer).merge(safe_merge=True, adapter_names=[name])
        except ValueError as error:
            raise AdapterError(
                f"{adapter.attached.path}: {path} cannot be merged ({error})"
            ) from error
        merged[f"{path}.weight"] = base.weight.data
        base.weight.data = before  # safe merging worked on a copy: these are the same bytes
        layer.merged_adapters[:] = merged_before
    return merged
