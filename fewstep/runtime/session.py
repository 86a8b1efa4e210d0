"""The boundary of the runtime: a graph that turns named arrays into named arrays."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fewstep.runtime.manifest import Graph

Feeds = Mapping[str, np.ndarray]


class Session(Protocol):
    """One loaded graph on one engine. Safe to call from several threads.

    Attributes:
        graph: Its manifest entry: names, element types, dims.
        provider: Which engine runs it, for people ("cpu", "cuda", "openvino", ...).
    """

    graph: Graph
    provider: str

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            feeds: One array per input, by name; shapes as the manifest says.
            outputs: Those wanted; None gives all. Nodes that only serve others are skipped.

        Returns:
            Fresh arrays by name: never the memory of an input.
        """
        ...


class Loader(Protocol):
    """Makes sessions on one engine."""

    name: str

    def load(self, graph: Graph) -> Session:
        """Load one graph of the folder."""
        ...
