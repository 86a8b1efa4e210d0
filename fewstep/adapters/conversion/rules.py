"""The form of the name tables: one native module and the diffusers modules that are its rows."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One native module.

    Attributes:
        native: Its name, `{}` for numbers.
        parts: The diffusers modules that are its output rows, top to bottom; same numbers.
        swaps: Its output is (shift, scale) where diffusers has (scale, shift), as long as there
            are just these two; the modulations of a block have six or nine and agree.
    """

    native: str
    parts: tuple[str, ...]
    swaps: bool = False


def rules(native: str, diffusers: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules under two prefixes; parts of a fused module are separated by spaces, "~" swaps."""
    return tuple(
        Rule(
            f"{native}{name}",
            tuple(f"{diffusers}{part}" for part in parts.removeprefix("~").split()),
            swaps=parts.startswith("~"),
        )
        for name, parts in names.items()
    )


def same(*names: str) -> tuple[Rule, ...]:
    """Rules of modules that are called alike in both."""
    return tuple(Rule(name, (name,)) for name in names)
