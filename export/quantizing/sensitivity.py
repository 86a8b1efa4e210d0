"""What each layer costs when it alone is quantized, measured along the student's trajectory."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

from fewstep.export.checking.parity import relative_rms
from fewstep.export.quantizing.layers import Layer
from fewstep.export.quantizing.schemes import Scheme
from fewstep.runtime.manifest import Graph
from fewstep.runtime.onnx_session import OnnxLoader
from fewstep.runtime.session import Feeds, Session

GROUPS = 48
"""Layers are measured one by one up to this many, and above it in groups of one place."""
FEEDS = 12
"""Calls each is measured on: spread over all that were recorded."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One layer, or a group of them.

    Attributes:
        name: Of the layer, or what the group's names begin with.
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


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """All of them, the most sensitive first.

    Attributes:
        found: Per layer or group.
        whole: Error with all of them quantized at once.
    """

    found: tuple[Sensitivity, ...]
    whole: float

    def worst(self, count: int) -> tuple[str, ...]:
        """Layers of the most sensitive ones."""
        return tuple(name for one in self.found[:count] for name in one.layers)

    def within(self, budget: float) -> tuple[str, ...]:
        """Layers to skip so that the rest is expected within a relative error.

        Errors of layers are taken as independent: their squares add up. What the sum misses of the
        error that was measured with all of them is spread over them evenly.
        """
        total = sum(one.error**2 for one in self.found)
        if total == 0.0:
            return ()
        share = self.whole**2 / total
        skipped: list[str] = []
        for one in self.found:
            if math.sqrt(max(total, 0.0) * share) <= budget:
                break
            total -= one.error**2
            skipped += one.layers
        return tuple(skipped)

    def as_json(self) -> dict[str, Any]:
        """For the record beside the graphs."""
        return {"whole": self.whole, "layers": [asdict(one) for one in self.found]}

    def table(self, skipped: Sequence[str], rows: int = 20) -> Table:
        """The most sensitive ones, for people."""
        table = Table(title=f"error with all of them: {self.whole:.4f}", title_justify="left")
        for heading in ("layer", "bytes", "error", "worst call", "stays float"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for one in self.found[:rows]:
            kept = "yes" if set(one.layers) <= set(skipped) else ""
            cells = (f"{one.size}", f"{one.error:.5f}", f"{one.worst:.5f}", kept)
            table.add_row(one.name, *cells)
        return table


def measure_sensitivity(
    model: ir.Model,
    graph: Graph,
    scheme: Scheme,
    layers: Sequence[Layer],
    feeds: Sequence[Feeds],
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> Sensitivities:
    """Quantize one layer at a time and see what becomes of the output.

    Args:
        model: After `Scheme.prepare`.
        graph: Its manifest entry.
        scheme: How it is quantized.
        layers: Those that may be.
        feeds: Inputs along trajectories.
        progress: Told what is measured.
    """
    some = spread(feeds, FEEDS)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        ir.save(model, source, external_data="source.onnx_data")
        output = graph.outputs[0].name
        wanted = _answers(_session(source, graph), some, output)

        def error_of(chosen: Sequence[Layer]) -> tuple[float, float]:
            target = Path(folder) / "target.onnx"
            scheme.quantize(source, target, chosen, some if scheme.needs_feeds else ())
            found = _answers(_session(target, graph), some, output)
            each = [relative_rms(a, b) for a, b in zip(wanted, found, strict=True)]
            for file in Path(folder).glob("target.onnx*"):
                file.unlink()
            return float(np.sqrt(np.mean(np.square(each)))), max(each)

        found = []
        groups = grouped(layers)
        for name, group in groups.items():
            progress(f"sensitivity: {name}")
            error, worst = error_of(group)
            size = sum(layer.size for layer in group)
            names = tuple(dict.fromkeys(layer.name for layer in group))
            found.append(Sensitivity(name, names, size, error, worst))
        whole, _ = error_of(layers)
    found.sort(key=lambda one: -one.error)
    return Sensitivities(tuple(found), whole)


def grouped(layers: Sequence[Layer], most: int = GROUPS) -> dict[str, list[Layer]]:
    """Layers by themselves, or by ever shorter beginnings of their names until few enough."""
    for depth in range(max(layer.name.count(".") for layer in layers) + 1, 0, -1):
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
        if len(groups) <= most or depth == 1:
            return groups
    return {}


def spread(feeds: Sequence[Feeds], count: int) -> list[Feeds]:
    """At most this many of them: whole steps of a trajectory and several trajectories."""
    places = np.unique(np.linspace(0, len(feeds) - 1, min(count, len(feeds))).round().astype(int))
    return [feeds[place] for place in places]


def _session(file: Path, graph: Graph) -> Session:
    from dataclasses import replace

    return OnnxLoader(file.parent, {}, has_cache=False).load(replace(graph, file=file.name))


def _answers(session: Session, feeds: Sequence[Feeds], output: str) -> list[np.ndarray]:
    return [session.run(given, [output])[output] for given in feeds]
