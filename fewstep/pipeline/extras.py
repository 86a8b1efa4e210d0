"""Parts of adapters that are no LoRA: whole differences of biases, norms and small layers."""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor, nn

from fewstep.pipeline.attached_adapter import AdapterWeights
from fewstep.pipeline.weight_sets import WeightSets, owner_of


@final
class ExtraWeights:
    """The whole differences of some adapters, added exactly and taken back exactly.

    Args:
        models: Component -> model, before anything is attached.
        adapters: Whose extras they are; several for one component take turns.

    Raises:
        PipelineError: A weight cannot be exchanged (quantised, offloaded).
    """

    def __init__(self, models: Mapping[str, nn.Module], adapters: Sequence[AdapterWeights]) -> None:
        self._sets: dict[str, WeightSets] = {}
        self._versions: dict[str, dict[int, int]] = {}
        for component, model in models.items():
            mine = [i for i, a in enumerate(adapters) if component in a.parts]
            values = [whole_extras(model, adapters[i], component) for i in mine]
            if any(values):
                self._sets[component] = WeightSets(model, values)
                self._versions[component] = {index: k for k, index in enumerate(mine)}

    def check_in_place(self) -> None:
        """Before an image: refuse to exchange weights that offloading keeps elsewhere.

        Raises:
            PipelineError: It does.
        """
        for sets in self._sets.values():
            if sets.count > 1:
                sets.check_in_place()

    def show(self, current: Mapping[str, int]) -> None:
        """Put the extras of the current adapters in place.

        Args:
            current: Component -> position of its adapter.
        """
        for component, sets in self._sets.items():
            sets.show(self._versions[component][current[component]])

    def remove(self) -> None:
        """Give all components their own weights back.

        Raises:
            PipelineError: Offloading keeps the weights elsewhere.
        """
        for sets in self._sets.values():
            sets.check_in_place()
            sets.show(None)


def whole_extras(
    model: nn.Module,
    adapter: AdapterWeights,
    component: str,
    merged: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Parameter name -> its whole new value, for what an adapter adds whole.

    Args:
        model: Whose parameters.
        adapter: Whose extras.
        component: The model's name in the pipeline.
        merged: Values that replace the model's own as what is added to.
    """
    values = {}
    for name, difference in adapter.parts[component].extras.items():
        own = owner_of(model, name).get_parameter(name.rpartition(".")[2]).data
        before = (merged or {}).get(name, own)
        wide = before.float() + adapter.attached.scale * difference.to(before.device).float()
        values[name] = wide.to(before.dtype)
    return values
