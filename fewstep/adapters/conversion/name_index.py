"""From whatever a file calls a layer to the diffusers modules of one base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fewstep.adapters.conversion.name_rules import RULES, NativeModule, native_modules
from fewstep.adapters.conversion.parts import without_prefixes

_COMPONENT = re.compile(r"(unet|transformer(?:_2)?)\.")


@dataclass(frozen=True, slots=True)
class Target:
    """What a name means.

    Attributes:
        parts: diffusers modules, in the order of the rows.
        rows: Output size of each.
        swaps: Whether the halves of the rows change places.
        native: The native module if this was its name, else None.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    swaps: bool = False
    native: str | None = None


class NameIndex:
    """Every name that one base's layers go by.

    Args:
        family: A key of `name_rules.RULES`; another or None: diffusers names only.
        shapes: diffusers parameter name -> shape.
    """

    def __init__(self, family: str | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        weights = weights_of(shapes)
        self.native: tuple[NativeModule, ...] = (
            native_modules(family, weights) if family in RULES else ()
        )
        self._targets: dict[str, Target] = {}
        for module, shape in weights.items():
            self._add(module, Target((module,), shape[:1]))
            if module.endswith(".to_out.0"):  # as old attention processors and others end
                self._add(module.removesuffix(".0"), Target((module,), shape[:1]))
        for module in self.native:
            target = Target(module.parts, module.rows, module.swaps, module.name)
            for name in _spellings(module.name, family):
                self._add(name, target)
        for module in self.native:
            if module.name.endswith(".linear1"):  # Flux files that adapt only the attention of it
                self._add(f"{module.name}_qkv", Target(module.parts[:3], module.rows[:3]))

    def find(self, body: str) -> Target | None:
        """The target of a layer's name, prefixes and all; None if the base has no such layer."""
        for name in without_prefixes(body):
            if target := self._targets.get(name):
                return target
        return None

    def _add(self, name: str, target: Target) -> None:
        self._targets.setdefault(name, target)
        self._targets.setdefault(name.replace(".", "_"), target)


def component_of(body: str) -> str | None:
    """The denoiser component a layer's name begins with, or None."""
    match = _COMPONENT.match(body)
    return match[1] if match else None


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """diffusers module -> shape of its weight."""
    return {
        name.removesuffix(".weight"): tuple(shape)
        for name, shape in shapes.items()
        if name.endswith(".weight")
    }


def _spellings(native: str, family: str | None) -> list[str]:
    names = [native]
    if family == "hunyuan-video":
        names.append(_first_hunyuan(native))
    return names


def _first_hunyuan(name: str) -> str:
    name = re.sub(r"_attn\.(qkv|proj)$", r"_attn_\1", name)
    name = re.sub(r"(_mod|modulation)\.lin$", r"\1.linear", name)
    name = re.sub(r"mlp\.0$", "mlp.fc1", name)
    name = re.sub(r"mlp\.2$", "mlp.fc2", name)
    name = re.sub(r"^((?:time|guidance)_in|txt_in\.t_embedder)\.in_layer$", r"\1.mlp.0", name)
    name = re.sub(r"^((?:time|guidance)_in|txt_in\.t_embedder)\.out_layer$", r"\1.mlp.2", name)
    name = re.sub(r"^(txt_in\.c_embedder)\.in_layer$", r"\1.linear_1", name)
    return re.sub(r"^(txt_in\.c_embedder)\.out_layer$", r"\1.linear_2", name)
