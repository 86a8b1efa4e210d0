"""The effect probe in the first picture: a hook that measures once and removes itself.

Cost: one more network call per adapter. Nothing is kept but the call's own tensors while it runs,
and nothing random is drawn. The second call goes to the network's `forward`, so that hooks of
others do not count it. It waits while it cannot tell: an adapter that the user switched off or
weighted 0, gradients, a cache between steps. A network that is compiled, whole or in blocks, is not
probed: switching the adapter off would make a second graph of it. Draw the first picture before
compiling.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.pipeline.effect_probe import (
    EPSILON,
    Effect,
    active_ours,
    check_effect,
    compare,
    ours_among,
)
from fewstep.pipeline.lora_layers import lora_layers, plain_model


def watch_effect(model: nn.Module, *, epsilon: float = EPSILON) -> "EffectWatch":
    """Check every one of our adapters on a network in the first call that it is active in.

    The error of `check_effect` then comes out of the pipeline's call, and again out of the next
    ones until the adapter has an effect. Adapters that take turns (phase experts) are checked one
    by one as their turn comes; a weight of 0 is the user's wish and waits.

    Args:
        model: A denoiser with our adapter on it, not compiled.
        epsilon: Smallest relative effect that counts.

    Returns:
        What was found so far; `stop()` ends the watch early.
    """
    return EffectWatch(model, epsilon)


def watch_pipeline(pipe: DiffusionPipeline, *, epsilon: float = EPSILON) -> "list[EffectWatch]":
    """`watch_effect` on every denoiser of a pipeline that carries one of our adapters.

    Args:
        pipe: The pipeline; LoRAs of its text encoders are not watched.
        epsilon: Smallest relative effect that counts.
    """
    watches = []
    for name, component in pipe.components.items():
        model = plain_model(component)
        if model is not None and not name.startswith("text_encoder"):
            watches.append(watch_effect(model, epsilon=epsilon))
    return [watch for watch in watches if watch.waiting]


class EffectWatch:
    """A hook that measures and then removes itself; made by `watch_effect`.

    Attributes:
        effects: What was measured, in the order of the calls.
        waiting: Adapters that have not been found to have an effect yet.
    """

    def __init__(self, model: nn.Module, epsilon: float) -> None:
        self.effects: list[Effect] = []
        self.waiting = {
            name for layer in lora_layers(model).values() for name in ours_among(layer.r)
        }
        self._epsilon = epsilon
        self._handle = None
        if self.waiting:
            self._handle = model.register_forward_hook(self._on_call, with_kwargs=True)

    def stop(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _on_call(
        self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return  # no second graph, and no business in someone's training
        if getattr(model, "is_cache_enabled", False) or _is_called_with_scale_0(keywords):
            return
        if _has_compiled_parts(model):
            self.stop()
            return
        layers = list(lora_layers(model).values())
        self.waiting = {name for name in self.waiting if any(name in layer.r for layer in layers)}
        active = {name for name in active_ours(model) if not _is_weighted_0(layers, name)}
        if active & self.waiting:  # else it is another one's turn
            effect = compare(model, arguments, keywords, output)
            self.effects.append(effect)
            check_effect(model, effect, epsilon=self._epsilon)
            self.waiting -= active
        if not self.waiting:
            self.stop()


def _is_called_with_scale_0(keywords: Mapping[str, Any]) -> bool:
    """diffusers' cross_attention_kwargs, joint_attention_kwargs and the like."""
    return any(isinstance(v, Mapping) and v.get("scale") == 0 for v in keywords.values())


def _has_compiled_parts(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def _is_weighted_0(layers: Sequence[Any], name: str) -> bool:
    """By set_adapters; an alpha of 0 in the file is no wish of the user's."""
    with_it = [layer for layer in layers if name in layer.r]
    return all(layer.scaling[name] == 0.0 for layer in with_it) and any(
        layer.lora_alpha[name] != 0.0 for layer in with_it
    )
