"""Which layers are the most sensitive, found without measuring every one alone.

Groups of layers are measured first. The most sensitive group is divided and its parts are measured,
again and again, until what is to be skipped are layers and no groups. A layer is taken to cost no
more than its group does, so that no group that is left holds a more sensitive one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fewstep.export.quantizing.layers import Layer
from fewstep.export.quantizing.sensitivities import Sensitivities, Sensitivity
from fewstep.export.quantizing.skipping import Skips

GROUPS = 48
"""Measured first, at most: no more layers than this are measured one by one at once."""
PARTS = 3
"""Of a group that is divided, at most. Few: most groups hold one layer that costs far more."""
MOST = 3 * GROUPS
"""Measurements after which a group is divided only while there are too few layers to skip."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What becomes of the output when some layers are quantized.

    Attributes:
        error: Root mean square of the difference, relative, over all calls.
        worst: The largest of a single call.
    """

    error: float
    worst: float


def rank(
    layers: Sequence[Layer],
    skips: Skips,
    measure: Callable[[Sequence[Layer]], Cost],
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> Sensitivities:
    """Measure groups, and layer by layer what these skips would leave in float.

    Args:
        layers: Those that may be quantized, at least one.
        skips: How many are looked for, or within which budget.
        measure: Quantizes some layers, while the others stay float.
        progress: Told what is measured.
    """
    survey = _Survey(layers, measure, progress)
    whole = survey.look("all layers", survey.names).error
    found = [survey.look(name, names) for name, names in survey.places()]
    while True:
        found.sort(key=lambda one: -one.error)
        known = Sensitivities(tuple(found), whole)
        groups = [one for one in known.in_question(skips) if not one.is_layer]
        has_enough = len(known.worst(skips.worst)) == skips.worst
        if not groups or (survey.count + PARTS > MOST and has_enough):
            return Sensitivities(tuple(found), whole, is_settled=not groups)
        found.remove(groups[0])
        found += [survey.look(title(names), names) for names in divided(groups[0].layers)]


@dataclass(slots=True)
class _Survey:
    """Measures layers by name; one name may stand for several, as of an upsampling convolution."""

    layers: Sequence[Layer]
    measure: Callable[[Sequence[Layer]], Cost]
    progress: Callable[[str], None]
    count: int = 0
    known: dict[str, list[Layer]] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {}
        for layer in self.layers:
            self.known.setdefault(layer.name, []).append(layer)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.known)

    def places(self) -> list[tuple[str, tuple[str, ...]]]:
        """Groups to begin with, each with its title."""
        found = []
        for name, group in grouped(self.layers, GROUPS).items():
            names = tuple(dict.fromkeys(layer.name for layer in group))
            found.append((name if len(names) > 1 else title(names), names))
        return found

    def look(self, name: str, names: Sequence[str]) -> Sensitivity:
        self.count += 1
        most = max(MOST, self.count) if len(self.known) > GROUPS else len(self.known) + 1
        self.progress(f"sensitivity: {name} (measurement {self.count} of {most} or fewer)")
        chosen = [layer for one in names for layer in self.known[one]]
        cost, size = self.measure(chosen), sum(layer.size for layer in chosen)
        return Sensitivity(name, tuple(names), size, cost.error, cost.worst)


def grouped(layers: Sequence[Layer], most: int = GROUPS) -> dict[str, list[Layer]]:
    """Layers by themselves, or by ever shorter beginnings of their names until few enough."""
    for depth in range(max(layer.name.count(".") for layer in layers) + 1, 0, -1):
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
        if len(groups) <= most or depth == 1:
            return groups
    return {}


def divided(names: Sequence[str], most: int = PARTS) -> list[tuple[str, ...]]:
    """Neighbours in parts of about one size."""
    edges = np.linspace(0, len(names), min(most, len(names)) + 1).round().astype(int)
    return [tuple(names[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def title(names: Sequence[str]) -> str:
    """Of a part: its only name, or the first and the last."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
