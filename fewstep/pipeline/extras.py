"""Parts of adapters that are no LoRA: whole differences of parameters, and rotated weights."""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor, nn

from fewstep.errors import PipelineError
from fewstep.heads import lorad
from fewstep.pipeline.attached_adapter import AdapterWeights
from fewstep.pipeline.lora_layers import Angles
from fewstep.pipeline.our_layers import (
    LayerPlace,
    check_none_merged,
    is_any_merged,
    layer_place,
    merged_error,
)
from fewstep.pipeline.weight_sets import WeightSets, owner_of


@final
class ExtraWeights:
    """The whole differences and rotations of some adapters, merged and taken back exactly.

    Args:
        models: Component -> model, before anything is attached.
        adapters: Whose extras they are; several for one component take turns.

    Raises:
        PipelineError: A weight cannot be exchanged (quantised, offloaded).
    """

    def __init__(self, models: Mapping[str, nn.Module], adapters: Sequence[AdapterWeights]) -> None:
        self._sets: dict[str, WeightSets] = {}
        self._versions: dict[str, dict[int, int]] = {}
        self._places: dict[str, list[LayerPlace]] = {}
        for component, model in models.items():
            mine = [i for i, a in enumerate(adapters) if component in a.parts]
            values = [whole_extras(model, adapters[i], component) for i in mine]
            if any(values):
                self._sets[component] = WeightSets(model, values)
                names = sorted({name for one in values for name in one})
                weights = (name for name in names if name.endswith(".weight"))
                self._places[component] = [
                    layer_place(model, name.removesuffix(".weight")) for name in weights
                ]
                self._versions[component] = {index: k for k, index in enumerate(mine)}

    def check_in_place(self) -> None:
        """Before an image: refuse to exchange weights that offloading keeps elsewhere.

        Raises:
            PipelineError: It does, or a LoRA was merged into one of the weights.
        """
        for component, sets in self._sets.items():
            if sets.count > 1:
                sets.check_in_place()
                if is_any_merged(self._places[component]):
                    raise merged_error(component)

    def show(self, current: Mapping[str, int]) -> None:
        """Put the extras of the current adapters in place.

        Args:
            current: Component -> position of its adapter; others stay as they are.
        """
        for component, sets in self._sets.items():
            if component in current:
                sets.show(self._versions[component][current[component]])

    def remove(self) -> None:
        """Give all components their own weights back.

        Raises:
            PipelineError: Offloading keeps the weights elsewhere, or a LoRA was merged into them.
        """
        for component, sets in self._sets.items():
            sets.check_in_place()
            check_none_merged(component, self._places[component])
        for sets in self._sets.values():
            sets.show(None)


def whole_extras(
    model: nn.Module,
    adapter: AdapterWeights,
    component: str,
    merged: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Parameter name -> its whole new value, for what an adapter adds whole or rotates.

    Args:
        model: Whose parameters.
        adapter: Whose extras and rotations.
        component: The model's name in the pipeline.
        merged: Values that replace the model's own as what is added to.

    Raises:
        PipelineError: A weight that is to be rotated is quantised.
    """
    values = {
        f"{module}.weight": _rotated(model, module, angles, adapter.attached.scale)
        for module, angles in adapter.parts[component].rotations.items()
    }
    for name, difference in adapter.parts[component].extras.items():
        own = owner_of(model, name).get_parameter(name.rpartition(".")[2]).data
        before = (merged or {}).get(name, own)
        wide = before.float() + adapter.attached.scale * difference.to(before.device).float()
        values[name] = wide.to(before.dtype)
    return values


def _rotated(model: nn.Module, module: str, angles: Angles, scale: float) -> Tensor:
    weight = owner_of(model, f"{module}.weight").get_parameter("weight").data
    if not weight.is_floating_point():
        raise PipelineError(
            f"{module}.weight is quantised ({weight.dtype}), so it cannot be rotated; load the "
            "base unquantised"
        )
    return lorad.merged(weight, angles.a, angles.b, scale)
