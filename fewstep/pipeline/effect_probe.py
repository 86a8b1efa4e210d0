"""Does the adapter change what the network says? Asked of a real call, not of a dummy.

On quantised or fp8 bases, after a scale of 0 or in layers that skip their LoRA, an adapter loads
without complaint and does nothing (diffusers issue 11215, flux issue 157); the picture is that of
the teacher at four steps, grey and blurred. So a call of the denoiser is made a second time without
the adapter, and the two answers must differ; `effect_watch` does that in the first picture.

    relative effect = |output with - output without| / |output without|    over all numbers, float32
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline.lora_layers import active_adapters, lora_layers

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
        return compare(model, arguments, given, cast(Any, model).forward(*arguments, **given))


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


def compare(
    model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], output: Any
) -> Effect:
    """Call a network without our active adapters, and compare with the output it has given.

    Raises:
        PipelineError: None of our adapters is active in it.
    """
    names = active_ours(model)
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
            if ours_among(active):
                # Set directly: peft's set_adapter also changes what is trainable.
                before.append((layer, cast(Any, layer)._active_adapter))
                others = [name for name in active if not name.startswith(PREFIX)]
                cast(Any, layer)._active_adapter = others
        yield
    finally:
        for layer, names in before:
            layer._active_adapter = names


def ours_among(names: Iterable[str]) -> list[str]:
    """Those of these adapter names that are ours."""
    return [name for name in names if name.startswith(PREFIX)]


def active_ours(model: nn.Module) -> tuple[str, ...]:
    """Our adapters that are loaded and switched on in any layer."""
    found: dict[str, None] = {}
    for layer in lora_layers(model).values():
        state = cast(Any, layer)
        if not state.disable_adapters and not state.merged:
            found.update((n, None) for n in ours_among(active_adapters(layer)) if n in layer.r)
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
