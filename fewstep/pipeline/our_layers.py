"""The layers of one model that carry our adapters: whether they still do, and which one is on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from peft.tuners.lora import LoraLayer
from torch import nn

from fewstep.errors import PipelineError
from fewstep.pipeline.lora_layers import active_adapters, lora_layers


@dataclass(frozen=True, slots=True)
class Condition:
    """What became of our layers since the last image.

    Attributes:
        is_gone: Some were removed (unload_lora_weights), or lost an adapter of ours.
        is_merged: Some are merged (fuse_lora), so that which adapter is active has no effect.
        is_disabled: LoRA is disabled altogether.
        is_off: None of our adapters is active in any of them.
        is_right: In all of them exactly the wanted one of ours is active.
    """

    is_gone: bool
    is_merged: bool
    is_disabled: bool
    is_off: bool
    is_right: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer sits in its model, and which of our adapters it carries."""

    parent: nn.Module
    child: str
    layer: LoraLayer
    ours: frozenset[str]


@final
class OurLayers:
    """Our layers of one model, remembered: a model's modules take milliseconds to walk over.

    Args:
        model: The model, adapters attached.
        names: What peft calls our adapters.
    """

    def __init__(self, model: nn.Module, names: frozenset[str]) -> None:
        self._names = names
        self._places = []
        for path, layer in lora_layers(model).items():
            if ours := names & layer.r.keys():
                parent, _, child = path.rpartition(".")
                self._places.append(_Place(model.get_submodule(parent), child, layer, ours))

    @property
    def layers(self) -> list[LoraLayer]:
        """The layers, in the model's order."""
        return [place.layer for place in self._places]

    def condition(self, wanted: str) -> Condition:
        """Look at every layer once.

        Args:
            wanted: Which of our adapters should be the active one.
        """
        gone = merged = disabled = False
        on_somewhere, right = not self._places, True
        for place in self._places:
            layer = place.layer
            moved = place.parent._modules.get(place.child) is not layer
            gone = gone or moved or not place.ours <= layer.r.keys()
            merged = merged or bool(layer.merged_adapters)
            disabled = disabled or bool(cast(Any, layer).disable_adapters)
            on = [name for name in active_adapters(layer) if name in self._names]
            on_somewhere = on_somewhere or bool(on)
            right = right and on == ([wanted] if wanted in place.ours else [])
        return Condition(gone, merged, disabled, not on_somewhere, right)

    def turn_on(self, wanted: str) -> None:
        """Make one of ours the active one, beside whatever else is active."""
        for place in self._places:
            names = [n for n in active_adapters(place.layer) if n not in self._names]
            if wanted in place.ours:
                names.append(wanted)
            # set_adapter does the same and walks over every tensor to set requires_grad, for 20 us
            # a layer; all of them are frozen here.
            cast(Any, place.layer)._active_adapter = names

    def put_right(self, wanted: str, *, component: str, takes_turns: bool) -> Condition:
        """Look, and turn the wanted one on where it is not.

        Raises:
            PipelineError: The layers are gone, or merged where adapters take turns.
        """
        condition = self.condition(wanted)
        if condition.is_gone:
            raise PipelineError(
                "the few-step adapter was removed from this pipeline (unload_lora_weights removes "
                "all); unwrap() it and wrap it again, or fuse() before removing other LoRAs"
            )
        if condition.is_merged and takes_turns:
            raise merged_error(component)
        if not condition.is_right:
            self.turn_on(wanted)
        return condition


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a layer sits in its model, whatever wraps it there.

    Attributes:
        parent: The module it is in.
        child: Its name there.
    """

    parent: nn.Module
    child: str


def layer_place(model: nn.Module, path: str) -> LayerPlace:
    """The place of a layer, by its name in the model."""
    parent, _, child = path.rpartition(".")
    return LayerPlace(model.get_submodule(parent), child)


def is_any_merged(places: Sequence[LayerPlace]) -> bool:
    """Whether the user merged a LoRA of theirs (fuse_lora) into the weight of one of the layers."""
    layers = (place.parent._modules.get(place.child) for place in places)
    return any(isinstance(layer, LoraLayer) and layer.merged_adapters for layer in layers)


def check_none_merged(component: str, places: Sequence[LayerPlace]) -> None:
    """Refuse to exchange weights that hold a merged LoRA of the user's.

    Raises:
        PipelineError: One does.
    """
    if is_any_merged(places):
        raise PipelineError(
            f"fuse_lora() merged LoRAs into weights of {component} that are about to be "
            "exchanged; call unfuse_lora() first"
        )


def merged_error(component: str) -> PipelineError:
    """What to say of layers that `fuse_lora` merged: they ignore which adapter is active."""
    return PipelineError(
        f"fuse_lora() merged the LoRAs of {component}, so its experts can no longer take turns; "
        "call unfuse_lora() first"
    )


def advice(conditions: list[Condition], names: list[str]) -> str | None:
    """What to tell a user whose call would have run without the few-step adapter.

    Args:
        conditions: Of every model.
        names: What peft calls our adapters.
    """
    if any(condition.is_disabled for condition in conditions):
        return (
            "LoRA layers are disabled (disable_lora), the few-step adapter with them; call "
            "enable_lora(), or unwrap() the pipeline to sample without it"
        )
    if not any(condition.is_off for condition in conditions):
        return None
    return (
        f"the few-step adapter ({', '.join(names)}) had been switched off: loading a LoRA, or "
        "set_adapters, leaves on only what it names; it is on again beside the others (name it in "
        "set_adapters, with weight 0 if you want to do without)"
    )
