"""What carries a pipeline's few-step adapters, and changes them when the next call wants another.

The scheduler says which step comes next (`before_call`), so this works in every pipeline that
has a scheduler, with or without callbacks, and in image to image that starts in a later phase.
"""

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

from fewstep.errors import PipelineError
from fewstep.pipeline.attached_adapter import AdapterWeights, AttachedAdapter
from fewstep.pipeline.lora_layers import plain_model
from fewstep.pipeline.our_layers import OurLayers
from fewstep.trajectory import PlannedStep

logger = logging.getLogger(__name__)


class ExpertSwitch(ABC):
    """The few-step adapters of one pipeline: one, or several experts that take turns.

    Where each expert has a network of its own (Wan 2.2) the pipeline chooses between networks, and
    there is nothing to switch; where several share one network, `before_call` switches. Pipelines
    that share models (`from_pipe`) share the switch; the last one that is unwrapped removes it.
    """

    _holders: "weakref.WeakSet[DiffusionPipeline] | None" = None

    def hold(self, pipe: DiffusionPipeline) -> None:
        """Count a pipeline among those that sample with these adapters."""
        if self._holders is None:
            self._holders = weakref.WeakSet()
        self._holders.add(pipe)

    def release(self, pipe: DiffusionPipeline) -> bool:
        """Count it no longer; whether no other pipeline is left."""
        if self._holders is not None:
            self._holders.discard(pipe)
        return not self._holders

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_holders"}

    @property
    @abstractmethod
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on, in the order of the recipe's experts or routes."""

    @property
    @abstractmethod
    def is_permanent(self) -> bool:
        """Whether `fuse` made the adapters part of the weights."""

    @abstractmethod
    def before_call(self, planned: PlannedStep) -> None:
        """Make the expert of this step the active one; nothing to do if it already is."""

    @abstractmethod
    def turn_to(self, index: int) -> None:
        """Make one adapter the active one of its component; nothing to do if it already is.

        Args:
            index: Its position in `adapters`.
        """

    @abstractmethod
    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """Before an image: see that the adapters are still on, and turn them on if not.

        Returns:
            A sentence for the user if something had to be put right.

        Raises:
            PipelineError: They are gone, or were merged where they must be switched.
        """

    @abstractmethod
    def fuse(self, pipe: DiffusionPipeline) -> None:
        """Make the adapters part of the weights, for good.

        Raises:
            PipelineError: Several experts share one network; weights can hold one of them.
        """

    @abstractmethod
    def remove(self, pipe: DiffusionPipeline) -> None:
        """Give the pipeline its weights back, exactly.

        What the user merged with diffusers' own `fuse_lora` stays, and that is logged.

        Raises:
            PipelineError: It cannot be done; the pipeline stays as it is.
        """


def experts_by_component(adapters: Sequence[AdapterWeights]) -> dict[str, list[int]]:
    """Component -> positions of its adapters."""
    found: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        found.setdefault(adapter.attached.component, []).append(index)
    return found


def models_of(
    pipe: DiffusionPipeline, adapters: Sequence[AdapterWeights]
) -> Mapping[str, nn.Module]:
    """Component -> model of everything these adapters change."""
    names = {name for adapter in adapters for name in adapter.parts}
    models = {name: plain_model(pipe.components[name]) for name in sorted(names)}
    return {name: model for name, model in models.items() if model is not None}


def check_same_models(pipe: DiffusionPipeline, models: Mapping[str, nn.Module]) -> None:
    """Refuse a pipeline whose models were exchanged after wrapping.

    Raises:
        PipelineError: One was.
    """
    for name, model in models.items():
        if plain_model(pipe.components.get(name)) is not model:
            raise PipelineError(
                f"{name} was replaced after the few-step adapter was attached to it; unwrap() the "
                "pipeline before replacing it, then wrap it again"
            )


def check_one_per_network(adapters: Sequence[AttachedAdapter]) -> None:
    """Refuse to fuse or save several experts in one network.

    Raises:
        PipelineError: Two share a component.
    """
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.component in seen:
            raise PipelineError(
                f"{seen[adapter.component]} and {adapter.name} share {adapter.component}, whose "
                'weights can hold one of them; leave them switched (experts="fused" merges each '
                "into weights of its own), or unwrap() to save the base"
            )
        seen[adapter.component] = adapter.name


def was_fused(
    pipe: DiffusionPipeline, names: Set[str], by_component: Mapping[str, Sequence[int]]
) -> bool:
    """Whether the user merged all of our adapters with diffusers' own `fuse_lora`, which is fine.

    Not where experts share a network: there it froze one of them. Where one name stands for an
    adapter on each of two networks, diffusers' list of names cannot tell, and the answer is no.
    """
    if any(len(experts) > 1 for experts in by_component.values()) or len(names) < len(by_component):
        return False
    return isinstance(pipe, LoraBaseMixin) and names <= set(pipe.fused_loras)


def log_merged(
    pipe: DiffusionPipeline, layers: Mapping[str, OurLayers], ours: Sequence[str]
) -> None:
    """Before adapters are removed: tell of those that `fuse_lora` made part of the weights.

    Args:
        pipe: The pipeline.
        layers: Component -> our layers of it.
        ours: What peft calls our adapters.
    """
    fused = set(pipe.fused_loras) if isinstance(pipe, LoraBaseMixin) else set()
    merged = {
        name for our in layers.values() for layer in our.layers for name in layer.merged_adapters
    }
    if (fused | merged) & set(ours):
        logger.warning(
            "the adapter was merged into the weights by fuse_lora() and stays there; for the base "
            "itself call unfuse_lora() before unwrap(), or load it again"
        )
