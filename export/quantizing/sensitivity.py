"""What layers cost when they alone are quantized, measured along the student's trajectory."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fewstep.export.checking.parity import relative_rms
from fewstep.export.quantizing.layers import Layer
from fewstep.export.quantizing.ranking import Cost, rank
from fewstep.export.quantizing.schemes import Scheme
from fewstep.export.quantizing.sensitivities import Sensitivities
from fewstep.export.quantizing.skipping import Skips
from fewstep.runtime.manifest import Graph
from fewstep.runtime.onnx_session import OnnxLoader
from fewstep.runtime.session import Feeds, Session

FEEDS = 12
"""Calls each is measured on: spread over all that were recorded."""


def measure_sensitivity(
    model: ir.Model,
    graph: Graph,
    scheme: Scheme,
    layers: Sequence[Layer],
    feeds: Sequence[Feeds],
    *,
    skips: Skips,
    progress: Callable[[str], None] = lambda what: None,
) -> Sensitivities:
    """Quantize a few layers at a time and see what becomes of the output.

    Args:
        model: After `Scheme.prepare`.
        graph: Its manifest entry.
        scheme: How it is quantized.
        layers: Those that may be.
        feeds: Inputs along trajectories.
        skips: Which layers are looked for.
        progress: Told what is measured.
    """
    some = spread(feeds, FEEDS)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        ir.save(model, source, external_data="source.onnx_data")
        output = graph.outputs[0].name
        wanted = _answers(_session(source, graph), some, output)

        def measure(chosen: Sequence[Layer]) -> Cost:
            target = Path(folder) / "target.onnx"
            scheme.quantize(source, target, chosen, some if scheme.needs_feeds else ())
            found = _answers(_session(target, graph), some, output)
            each = [relative_rms(a, b) for a, b in zip(wanted, found, strict=True)]
            for file in Path(folder).glob("target.onnx*"):
                file.unlink()
            return Cost(float(np.sqrt(np.mean(np.square(each)))), max(each))

        return rank(layers, skips, measure, progress=progress)


def spread(feeds: Sequence[Feeds], count: int) -> list[Feeds]:
    """At most this many of them: whole steps of a trajectory and several trajectories."""
    places = np.unique(np.linspace(0, len(feeds) - 1, min(count, len(feeds))).round().astype(int))
    return [feeds[place] for place in places]


def _session(file: Path, graph: Graph) -> Session:
    return OnnxLoader(file.parent, {}, has_cache=False).load(replace(graph, file=file.name))


def _answers(session: Session, feeds: Sequence[Feeds], output: str) -> list[np.ndarray]:
    return [session.run(given, [output])[output] for given in feeds]
