"""What was measured of layers and groups of layers, and which of them are to stay float."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fewstep.export.quantizing.skipping import Skips


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One layer, or a group of them.

    Attributes:
        name: Of the layer; of a group, what its names begin with, or the first and the last.
        layers: Names of the layers.
        size: In bytes, as float.
        error: Of the denoiser's output when these alone are quantized: root mean square, relative,
            over all calls.
        worst: The largest of a single call.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    error: float
    worst: float

    @property
    def is_layer(self) -> bool:
        """Whether it is one layer and no group."""
        return len(self.layers) == 1


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """All of them, the most sensitive first.

    Attributes:
        found: Each layer once, alone or in a group.
        whole: Error with all of them quantized at once.
        is_settled: Whether what is skipped was measured layer by layer; if not, a group that was
            not divided may hold a layer as sensitive.
    """

    found: tuple[Sensitivity, ...]
    whole: float
    is_settled: bool = True

    def chosen(self, skips: Skips) -> tuple[str, ...]:
        """Layers that these skips leave in float."""
        names = self.worst(skips.worst)
        if skips.budget is not None:
            names += self.within(skips.budget)
        return tuple(dict.fromkeys(names))

    def in_question(self, skips: Skips) -> tuple[Sensitivity, ...]:
        """What these skips would take if a group counted as one layer."""
        count = skips.worst
        if skips.budget is not None:
            count = max(count, self._count_within(skips.budget))
        return self.found[:count]

    def worst(self, count: int) -> tuple[str, ...]:
        """The most sensitive of the layers that were measured alone."""
        alone = [one for one in self.found if one.is_layer]
        return tuple(one.layers[0] for one in alone[:count])

    def within(self, budget: float) -> tuple[str, ...]:
        """Layers to skip so that the rest is expected within a relative error.

        Errors of layers are taken as independent: their squares add up. What the sum misses of the
        error that was measured with all of them is spread over them evenly.
        """
        taken = self.found[: self._count_within(budget)]
        return tuple(name for one in taken for name in one.layers)

    def _count_within(self, budget: float) -> int:
        total = sum(one.error**2 for one in self.found)
        if total == 0.0:
            return 0
        share = self.whole**2 / total
        for count, one in enumerate(self.found):
            if math.sqrt(max(total, 0.0) * share) <= budget:
                return count
            total -= one.error**2
        return len(self.found)

    def as_json(self) -> dict[str, Any]:
        """For the record beside the graphs."""
        layers = [asdict(one) for one in self.found]
        return {"whole": self.whole, "settled": self.is_settled, "layers": layers}

    def table(self, skipped: Sequence[str], rows: int = 20) -> Table:
        """The most sensitive ones, for people."""
        table = Table(title=f"error with all of them: {self.whole:.4f}", title_justify="left")
        for heading in ("layer", "bytes", "error", "worst call", "stays float"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for one in self.found[:rows]:
            kept = "yes" if set(one.layers) <= set(skipped) else ""
            name = one.name if one.is_layer else f"{one.name} ({len(one.layers)} layers)"
            table.add_row(name, f"{one.size}", f"{one.error:.5f}", f"{one.worst:.5f}", kept)
        return table
