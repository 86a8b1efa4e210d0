"""The torch modules that graphs were made from, as an engine of the runtime."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from fewstep.errors import ExportError
from fewstep.export.part import Part
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds, Session


@dataclass(slots=True)
class TorchSession:
    """A part run by torch; see `Session`. Inputs take the module's own element type.

    Attributes:
        part: What is run.
        graph: Its manifest entry.
        provider: "torch".
        prepare: Called before each run, where several parts share a module.
    """

    part: Part
    graph: Graph
    provider: str = "torch"
    prepare: Callable[[], None] | None = None

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        if self.prepare is not None:
            self.prepare()
        with torch.no_grad():
            given = [self._tensor(name, feeds) for name in self._inputs]
            found = self.part.module.eval()(*given)
        whole = found if isinstance(found, tuple) else (found,)
        names = [port.name for port in self.part.outputs]
        arrays = {n: v.float().numpy() for n, v in zip(names, whole, strict=True)}
        return arrays if outputs is None else {name: arrays[name] for name in outputs}

    @property
    def _inputs(self) -> list[str]:
        return [port.name for port in self.part.inputs]

    def _tensor(self, name: str, feeds: Feeds) -> torch.Tensor:
        value = torch.from_numpy(np.ascontiguousarray(feeds[name]))
        port = next(port for port in self.part.inputs if port.name == name)
        follows = value.is_floating_point() and port.kind == "model"
        return value.to(self.part.dtype) if follows else value


@dataclass(slots=True)
class TorchLoader:
    """Gives the modules in place of the graphs.

    Attributes:
        parts: Of the pipeline, every one that has a graph.
        prepare: Name of a part -> what puts its weights into the module it shares.
        name: Of the engine.
    """

    parts: tuple[Part, ...]
    prepare: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    name: str = "torch"

    def load(self, graph: Graph) -> Session:
        """See `Loader.load`.

        Raises:
            ExportError: The pipeline has no such part.
        """
        wanted = graph.file.partition("/")[0]
        for part in self.parts:
            if part.name == wanted:
                return TorchSession(part, graph, prepare=self.prepare.get(wanted))
        known = ", ".join(part.name for part in self.parts)
        raise ExportError(f"the base has no {wanted}, only {known}; was the folder made from it?")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many threads of torch as the other side has, for a while; 0 leaves torch its choice."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
