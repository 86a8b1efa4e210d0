"""GPU memory of a session: what a combination of input shapes needs, kept for those used last.

Knows nothing of TensorRT; what it does is allocate, choose and give back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.manifest import Tensor
from fewstep.runtime.tensorrt import cuda
from fewstep.runtime.tensorrt.bfloat16 import from_bfloat16, to_bfloat16

KEPT_SHAPES = 8
"""Combinations of input shapes whose buffers and graphs a session keeps."""
KEPT_GRAPHS = 8
"""Graphs per combination: inputs from elsewhere on the GPU come at ever new addresses."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An output that stayed on the GPU.

    It holds its values until the second next call with the same shapes, and can be read until
    `KEPT_SHAPES` other combinations of shapes were run.

    Attributes:
        tensor: Name and element type.
        shape: Of the values.
        memory: The block on the GPU.
    """

    tensor: Tensor
    shape: Shape
    memory: cuda.Memory

    @property
    def address(self) -> int:
        """In GPU memory.

        Raises:
            RuntimeSettingError: The block was given back.
        """
        if self.memory.is_closed:
            raise RuntimeSettingError(
                f"output {self.tensor.name} of shape {self.shape} is no longer on the GPU: its "
                f"session was closed or ran {KEPT_SHAPES} other shapes since; bring it to the "
                "host, or feed it earlier"
            )
        return self.memory.address

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the bytes in memory; bfloat16 is kept as its bits."""
        return storage_type(self.tensor)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return nbytes(self.tensor, self.shape)


Feed = NDArray[Any] | DeviceArray


@dataclass(slots=True)
class Prepared:
    """What one combination of input shapes needs.

    Attributes:
        inputs: Name -> buffer for values that come from the host.
        outputs: Two sets of buffers.
        shapes: Of the outputs.
        graphs: Input and output addresses -> recorded graph; None where recording failed.
        last: Set that the last call wrote.
    """

    inputs: dict[str, cuda.Memory]
    outputs: tuple[dict[str, cuda.Memory], dict[str, cuda.Memory]]
    shapes: dict[str, Shape]
    graphs: dict[tuple[int, ...], cuda.Graph | None] = field(default_factory=dict)
    last: int = 1

    def free_set(self, read: set[int]) -> int:
        """The set of output buffers to write: not the last one, and never one that is read.

        Args:
            read: Addresses of this call's inputs.

        Raises:
            RuntimeSettingError: Both are read in this call.
        """
        for index in (1 - self.last, self.last):
            if read.isdisjoint(memory.address for memory in self.outputs[index].values()):
                return index
        raise RuntimeSettingError(
            "outputs of the last two calls are fed to one call, which leaves nowhere to write; "
            "bring one of them to the host first"
        )

    def keep_graph(self, addresses: tuple[int, ...], graph: cuda.Graph | None) -> None:
        """Keep what was recorded for these addresses, in place of the oldest if there are many.

        No graph may be under way.
        """
        while len(self.graphs) >= KEPT_GRAPHS:
            oldest = self.graphs.pop(next(iter(self.graphs)))
            if oldest is not None:
                oldest.close()
        self.graphs[addresses] = graph

    def drop_graphs(self) -> None:
        """Forget what was recorded."""
        for graph in self.graphs.values():
            if graph is not None:
                graph.close()
        self.graphs.clear()

    def close(self) -> None:
        """Give all of it back."""
        self.drop_graphs()
        for memory in (self.inputs, *self.outputs):
            close_all(memory.values())


class ShapeStore:
    """What is prepared, for the combinations of input shapes used last.

    Free sizes would otherwise fill the GPU: a prompt length or a picture size each takes buffers
    and graphs of its own.
    """

    def __init__(self) -> None:
        self._prepared: dict[tuple[Shape, ...], Prepared] = {}  # used last comes last

    def __iter__(self) -> Iterator[Prepared]:
        return iter(self._prepared.values())

    def get(self, key: tuple[Shape, ...], make: Callable[[], Prepared]) -> Prepared:
        """What was prepared for these shapes, made now if there is none.

        Where there are too many, the one used longest ago is given back first. No work may be under
        way.

        Args:
            key: Shapes of the inputs, in the graph's order.
            make: Allocates.
        """
        found = self._prepared.pop(key, None)
        if found is None:
            while len(self._prepared) >= KEPT_SHAPES:
                self._prepared.pop(next(iter(self._prepared))).close()
            found = make()
        self._prepared[key] = found
        return found

    def clear(self) -> None:
        """Give all of it back."""
        while self._prepared:
            self._prepared.popitem()[1].close()


def allocate(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    shapes: Mapping[str, Shape],
    results: Mapping[str, Shape],
) -> Prepared:
    """Buffers for one combination of shapes; all of them or none.

    Args:
        inputs: Of the graph.
        outputs: Of the graph.
        shapes: Of the inputs.
        results: Of the outputs.

    Raises:
        RuntimeSettingError: The GPU has no room.
    """
    made: list[cuda.Memory] = []

    def block(tensor: Tensor, shape: Shape) -> cuda.Memory:
        made.append(cuda.Memory(nbytes(tensor, shape)))
        return made[-1]

    try:
        first, second = ({t.name: block(t, results[t.name]) for t in outputs} for _ in range(2))
        fed = {t.name: block(t, shapes[t.name]) for t in inputs}
    except RuntimeSettingError:
        close_all(made)
        raise
    return Prepared(fed, (first, second), dict(results))


def close_all(blocks: Iterable[cuda.Memory]) -> None:
    """Give blocks back."""
    for memory in blocks:
        memory.close()


def as_feed(tensor: Tensor, feeds: Mapping[str, Feed]) -> Feed:
    """The value of one input, contiguous and of its element type.

    Raises:
        RuntimeSettingError: It is missing, or of another type.
    """
    value = feeds.get(tensor.name)
    if value is None:
        raise RuntimeSettingError(f"input {tensor.name} is missing; got {', '.join(feeds)}")
    if isinstance(value, DeviceArray):
        if value.tensor.dtype != tensor.dtype:
            raise RuntimeSettingError(
                f"input {tensor.name} is {tensor.dtype}, got an output of {value.tensor.dtype}"
            )
        return value
    if tensor.dtype == "bfloat16":
        return to_bfloat16(value)
    if value.dtype != np.dtype(tensor.dtype):
        raise RuntimeSettingError(
            f"input {tensor.name} is {tensor.dtype}, got {value.dtype}; convert it first"
        )
    return np.ascontiguousarray(value)


def to_host(tensor: Tensor, bits: NDArray[Any]) -> NDArray[Any]:
    """An output as numpy has it."""
    return from_bfloat16(bits) if tensor.dtype == "bfloat16" else bits


def storage_type(tensor: Tensor) -> np.dtype[Any]:
    """numpy's type of the bytes."""
    return np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)


def nbytes(tensor: Tensor, shape: Shape) -> int:
    """Size of a tensor in memory."""
    return int(np.prod(shape, dtype=np.int64)) * storage_type(tensor).itemsize
