"""What the networks of a folder are given while it draws: inputs along the student's own paths."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds, Loader, Session


@dataclass(slots=True)
class RecordingSession:
    """A session that keeps what it is given."""

    inner: Session
    kept: list[Feeds]
    graph: Graph
    provider: str

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        self.kept.append({name: np.array(value) for name, value in feeds.items()})
        return self.inner.run(feeds, outputs)


@dataclass(slots=True)
class RecordingLoader:
    """Loads sessions that keep what they are given.

    Attributes:
        inner: Loads the real ones.
        kept: File of the graph -> feeds, in the order of the calls.
        name: Of the engine.
    """

    inner: Loader
    kept: dict[str, list[Feeds]] = field(default_factory=dict)
    name: str = "recording"

    def load(self, graph: Graph) -> Session:
        """See `Loader.load`."""
        kept = self.kept.setdefault(graph.file, [])
        session = self.inner.load(graph)
        return RecordingSession(session, kept, session.graph, session.provider)


@dataclass(slots=True)
class KeepingLoader:
    """Loads each graph once, however often it is asked for.

    Attributes:
        inner: Loads the real ones.
        sessions: File of the graph -> its session.
        name: Of the engine.
    """

    inner: Loader
    sessions: dict[str, Session] = field(default_factory=dict)
    name: str = "kept"

    def load(self, graph: Graph) -> Session:
        """See `Loader.load`."""
        if graph.file not in self.sessions:
            self.sessions[graph.file] = self.inner.load(graph)
        return self.sessions[graph.file]
