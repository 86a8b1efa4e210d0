"""Does the adapter change what the network says? Asked of the first real call, not of a dummy.

On quantised or fp8 bases, after a scale of 0 or in layers that skip their LoRA, an adapter loads
without complaint and does nothing (diffusers issue 11215, flux issue 157); the picture is that of
the teacher at four steps, grey and blurred. So the first call of the denoiser that an adapter is
active in is made a second time without it, and the two answers must differ.

Cost: one more network call per adapter, once, in the first picture; then the hook is gone. Nothing
is kept but the call's own tensors while it runs. The second call goes to the network's `forward`,
so that hooks of others do not count it; caches between steps (first-block cache and the like) see
it and should be turned on after the first picture. A compiled network is not probed: switching the
adapter off would make a second graph of it. Draw the first picture before compiling.

    relative effect = |output with - output without| / |output without|    over all numbers, float32
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline.lora_layers import active_adapters, lora_layers, plain_model

PREFIX = "fewstep"
"""Adapters whose names begin so are ours; others stay on in both calls."""
EPSILON = 1e-5
"""An adapter without effect gives exactly 0 where kernels are deterministic; float32 kernels that
are not differ by some 1e-7, and a distilled adapter changes the output by 1e-3 and more."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What an adapter does to one call of a network.

    Attributes:
        relative: |with - without| / |without|; NaN where one of the two is not finite.
        is_finite_with: Whether the output with the adapter is finite.
        is_finite_without: Whether the output without it is.
        adapters: Names of the adapters that were switched.
    """

    relative: float
    is_finite_with: bool
    is_finite_without: bool
    adapters: tuple[str, ...]


def measure_effect(
    model: nn.Module, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
) -> Effect:
    """Call a network with our active adapters and without them; nothing is changed.

    Args:
        model: A denoiser with our adapter on it.
        arguments: Positional arguments of the call.
        keywords: Keyword arguments of the call.

    Raises:
        PipelineError: None of our adapters is active in it (never attached, or fused).
    """
    given = dict(keywords or {})
    with torch.no_grad():
        return _compare(model, arguments, given, cast(Any, model).forward(*arguments, **given))


def check_effect(model: nn.Module, effect: Effect, *, epsilon: float = EPSILON) -> None:
    """Refuse an adapter that does nothing, or destroys the output.

    Args:
        model: The network that the effect was measured on; for the message.
        effect: What was measured.
        epsilon: Smallest relative effect that counts.

    Raises:
        AdapterError: The effect is smaller, or the output is finite only without the adapter.
        PipelineError: The output is not finite even without it.
    """
    facts = _facts(model, effect.adapters)
    if not effect.is_finite_without:
        raise PipelineError(
            f"{type(model).__name__} gives NaN or infinity even without the adapter ({facts}); "
            "run it in bfloat16 or float32"
        )
    if not effect.is_finite_with:
        raise AdapterError(
            f"the adapter makes {type(model).__name__} give NaN or infinity ({facts}); run it in "
            "bfloat16 or float32, or lower the adapter's scale"
        )
    if effect.relative <= epsilon:
        raise AdapterError(
            f"the adapter has no effect: it changes the output of {type(model).__name__} by "
            f"{effect.relative:.1e}, wanted more than {epsilon:g} ({facts}); raise its scale, or "
            "load the base unquantised and fuse the adapter before quantising"
        )


def watch_effect(model: nn.Module, *, epsilon: float = EPSILON) -> "EffectWatch":
    """Check every one of our adapters on a network in the first call that it is active in.

    The error of `check_effect` then comes out of the pipeline's call. Adapters that take turns
    (phase experts) are checked one by one as their turn comes.

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
        waiting: Adapters that have not been active in a call yet.
    """

    def __init__(self, model: nn.Module, epsilon: float) -> None:
        self.effects: list[Effect] = []
        self.waiting = {name for layer in lora_layers(model).values() for name in _ours(layer.r)}
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
        active = set(_active(model))
        if not active & self.waiting:
            return  # another phase
        self.waiting -= active
        if not self.waiting:
            self.stop()
        effect = _compare(model, arguments, keywords, output)
        self.effects.append(effect)
        check_effect(model, effect, epsilon=self._epsilon)


def _compare(
    model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], output: Any
) -> Effect:
    names = _active(model)
    if not names:
        raise PipelineError(
            f"no active adapter of ours is on this {type(model).__name__}; probe it after it is "
            "attached and before it is fused"
        )
    with _switched_off(model):
        without = list(_tensors(cast(Any, model).forward(*arguments, **keywords)))
    given = list(_tensors(output))
    change = _norm([a.float() - b.float() for a, b in zip(given, without, strict=True)])
    size, size_with = _norm(without), _norm(given)
    relative = change / size if size else (math.inf if change else 0.0)
    if not (math.isfinite(size) and math.isfinite(size_with)):
        relative = math.nan
    return Effect(relative, math.isfinite(size_with), math.isfinite(size), names)


def _norm(tensors: Sequence[Tensor]) -> float:
    """Root of the sum of squares; in float64, where no finite float32 overflows."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating point tensors of a model's output: a tensor, tuples, lists, diffusers' outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, our adapters are not applied; others and everything else stay as they are."""
    before: list[tuple[Any, object]] = []
    try:
        for layer in lora_layers(model).values():
            active = active_adapters(layer)
            if _ours(active):
                # Set directly: peft's set_adapter also changes what is trainable.
                before.append((layer, cast(Any, layer)._active_adapter))
                others = [name for name in active if not name.startswith(PREFIX)]
                cast(Any, layer)._active_adapter = others
        yield
    finally:
        for layer, names in before:
            layer._active_adapter = names


def _ours(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(PREFIX)]


def _active(model: nn.Module) -> tuple[str, ...]:
    """Our adapters that are loaded and switched on in any layer."""
    found: dict[str, None] = {}
    for layer in lora_layers(model).values():
        state = cast(Any, layer)
        if not state.disable_adapters and not state.merged:
            found.update((n, None) for n in _ours(active_adapters(layer)) if n in layer.r)
    return tuple(found)


def _facts(model: nn.Module, adapters: Sequence[str]) -> str:
    """Scale, dtypes and quantisation of the layers that carry these adapters, in words."""
    scales, lora_dtypes, bases = set(), set(), set()
    layers = [layer for layer in lora_layers(model).values() if set(adapters) & set(layer.r)]
    for layer in layers:
        base: Any = layer.get_base_layer()
        bases.add(f"{type(base).__name__} with {_kind(base.weight)} weights")
        for name in set(adapters) & set(layer.r):
            scales.add(f"{float(layer.scaling[name]):g}")
            lora_dtypes.update(_kind(p) for p in layer.lora_A[name].parameters())
    return (
        f"{len(layers)} layers, scale {_some(scales)}, LoRA in {_some(lora_dtypes)}, on "
        f"{_some(bases)}"
    )


def _kind(tensor: Tensor) -> str:
    """float32, or the class of a quantised tensor with what it is stored in."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    is_plain = type(tensor) in (Tensor, nn.Parameter)
    return dtype if is_plain else f"{type(tensor).__name__} {dtype}"


def _some(values: set[str]) -> str:
    listed = sorted(values)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") if listed else "none"
