"""Runs one engine: buffers and a CUDA graph per shape.

Outputs live in two sets of buffers used in turn, so an output can be fed to the next call without
leaving the GPU, and no call ever reads and writes the same memory. A recorded graph holds shapes
and addresses, so it is used for exactly those and dropped when weights change.

Engine build and run are not verified on this release (docs/tensorrt.md).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.manifest import Graph, Tensor
from fewstep.runtime.tensorrt import cuda, engine
from fewstep.runtime.tensorrt.bfloat16 import from_bfloat16, to_bfloat16

PROVIDER = "tensorrt-native"
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An output that stayed on the GPU; valid until the second next call with the same shapes.

    Attributes:
        tensor: Name and element type.
        shape: Of the values.
        address: In GPU memory.
    """

    tensor: Tensor
    shape: Shape
    address: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the bytes in memory; bfloat16 is kept as its bits."""
        return storage_type(self.tensor)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Feed = NDArray[Any] | DeviceArray


@dataclass(slots=True)
class Prepared:
    """What one combination of input shapes needs.

    Attributes:
        profile: Index in the engine.
        inputs: Name -> buffer for values that come from the host.
        outputs: Two sets of buffers.
        shapes: Of the outputs.
        graphs: Input and output addresses -> recorded graph; None where recording failed.
        last: Set that the last call wrote.
    """

    profile: int
    inputs: dict[str, cuda.Memory]
    outputs: tuple[dict[str, cuda.Memory], dict[str, cuda.Memory]]
    shapes: dict[str, Shape]
    graphs: dict[tuple[int, ...], cuda.Graph | None] = field(default_factory=dict)
    last: int = 1


class TensorRtSession:
    """An engine that can be run. Safe to call from several threads: calls take turns.

    Args:
        plan: Content of engine.plan.
        graph: Its manifest entry; names and element types must be the engine's.
        device: GPU.
        use_graphs: Record a CUDA graph per shape.
        weight_budget_bytes: See `load_engine`.
        weights_from: ONNX file to take the weights of, for a stripped plan.

    Attributes:
        graph: Its manifest entry.
        provider: "tensorrt-native".

    Raises:
        RuntimeSettingError: The plan does not load here.
    """

    def __init__(
        self,
        plan: bytes,
        graph: Graph,
        *,
        device: int = 0,
        use_graphs: bool = True,
        weight_budget_bytes: int | None = None,
        weights_from: Path | None = None,
    ) -> None:
        cuda.use_device(device)
        self._device = device
        self._loaded = engine.load_engine(plan, weight_budget_bytes=weight_budget_bytes)
        if weights_from is not None:
            engine.refit_from_onnx(self._loaded, weights_from)
        trt_engine = self._loaded.engine
        self.graph, self.provider = graph, PROVIDER
        check_contract(graph.inputs, engine.tensors(trt_engine, are_inputs=True))
        check_contract(graph.outputs, engine.tensors(trt_engine, are_inputs=False))
        self._profiles = engine.profiles(trt_engine)
        self._context = trt_engine.create_execution_context()
        if self._context is None:
            raise RuntimeSettingError(
                "TensorRT could not make room for this engine on the GPU; free memory, or build "
                "it for smaller sizes"
            )
        self._stream = cuda.Stream()
        self._profile = 0
        self._use_graphs = use_graphs
        self._prepared: dict[tuple[Shape, ...], Prepared] = {}
        self._lock = threading.Lock()

    def run(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once and bring outputs to the host.

        Args:
            feeds: Every input by name, in its element type; bfloat16 inputs take float32.
            outputs: Those wanted; None gives all. All are computed, those wanted are copied.

        Returns:
            Fresh arrays by name; bfloat16 comes as float32.

        Raises:
            RuntimeSettingError: A name, type or shape is wrong, or the GPU failed.
        """
        with self._lock:
            made = self._run(feeds)
            wanted = made if outputs is None else {name: made[name] for name in outputs}
            found = {name: np.empty(o.shape, o.dtype) for name, o in wanted.items()}
            for name, output in wanted.items():
                self._stream.download(output.address, found[name])
            self._stream.wait()
        return {name: to_host(wanted[name].tensor, bits) for name, bits in found.items()}

    def run_on_device(self, feeds: Mapping[str, Feed]) -> dict[str, DeviceArray]:
        """Run once and leave the outputs on the GPU, to be fed to the next call.

        Raises:
            RuntimeSettingError: As `run`.
        """
        with self._lock:
            outputs = self._run(feeds)
            self._stream.wait()
        return outputs

    def refit(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Replace weights by the names of their parameters; recorded graphs are dropped.

        Raises:
            RuntimeSettingError: See `engine.refit`.
        """
        with self._lock:
            cuda.use_device(self._device)
            self._stream.wait()
            kept = engine.refit(self._loaded, weights, self._stream.handle)
            self._stream.wait()
            del kept  # only now has TensorRT read them
            for prepared in self._prepared.values():
                drop_graphs(prepared)

    def close(self) -> None:
        """Free what the session holds on the GPU; it cannot be used afterwards."""
        with self._lock:
            self._stream.wait()
            for prepared in self._prepared.values():
                drop_graphs(prepared)
                for memory in (prepared.inputs, *prepared.outputs):
                    for block in memory.values():
                        block.close()
            self._prepared.clear()
            self._stream.close()

    def _run(self, feeds: Mapping[str, Feed]) -> dict[str, DeviceArray]:
        cuda.use_device(self._device)  # the current device belongs to the thread
        arrays = {tensor.name: as_feed(tensor, feeds) for tensor in self.graph.inputs}
        if len(feeds) != len(arrays):
            unknown = sorted(set(feeds) - set(arrays))
            raise RuntimeSettingError(
                f"{unknown[0]} is no input of this engine; it has {', '.join(arrays)}"
            )
        prepared = self._prepare({name: tuple(a.shape) for name, a in arrays.items()})
        addresses = {
            name: a.address if isinstance(a, DeviceArray) else prepared.inputs[name].address
            for name, a in arrays.items()
        }
        index = free_set(prepared, set(addresses.values()))
        outputs = prepared.outputs[index]
        self._point(prepared, addresses, outputs)
        for name, array in arrays.items():
            if not isinstance(array, DeviceArray):
                self._stream.upload(array, addresses[name])
        self._execute(prepared, (*addresses.values(), *(m.address for m in outputs.values())))
        prepared.last = index
        return {
            tensor.name: DeviceArray(
                tensor, prepared.shapes[tensor.name], outputs[tensor.name].address
            )
            for tensor in self.graph.outputs
        }

    def _prepare(self, shapes: dict[str, Shape]) -> Prepared:
        key = tuple(shapes.values())
        profile = engine.choose_profile(self._profiles, shapes)
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._stream.handle):
                raise RuntimeSettingError(f"TensorRT refused profile {profile} of this engine")
            self._stream.wait()
            self._profile = profile
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise RuntimeSettingError(f"TensorRT refused shape {shape} for {name}")
        if key not in self._prepared:
            self._prepared[key] = self._allocate(profile, shapes)
        return self._prepared[key]

    def _allocate(self, profile: int, shapes: dict[str, Shape]) -> Prepared:
        unknown = self._context.infer_shapes()
        if unknown:
            raise RuntimeSettingError(
                f"the shape of {unknown[0]} depends on values, which this session cannot give"
            )
        results = {
            t.name: tuple(self._context.get_tensor_shape(t.name)) for t in self.graph.outputs
        }
        for name, shape in results.items():
            if min(shape, default=0) < 0:
                raise RuntimeSettingError(
                    f"the shape of output {name} depends on values; export a graph whose output "
                    "sizes follow from its input sizes"
                )
        first, second = (
            {t.name: cuda.Memory(nbytes(t, results[t.name])) for t in self.graph.outputs}
            for _ in range(2)
        )
        inputs = {t.name: cuda.Memory(nbytes(t, shapes[t.name])) for t in self.graph.inputs}
        return Prepared(profile, inputs, (first, second), results)

    def _point(
        self, prepared: Prepared, inputs: dict[str, int], outputs: dict[str, cuda.Memory]
    ) -> None:
        targets = inputs | {name: memory.address for name, memory in outputs.items()}
        for name, address in targets.items():
            if not self._context.set_tensor_address(name, address):
                raise RuntimeSettingError(f"TensorRT refused the buffer of {name}")

    def _execute(self, prepared: Prepared, addresses: tuple[int, ...]) -> None:
        if not self._use_graphs:
            self._enqueue()
            return
        if addresses not in prepared.graphs:
            self._enqueue()  # the first run of a shape sets things up that must not be recorded
            self._stream.wait()
            prepared.graphs[addresses] = self._stream.capture(self._enqueue)
            return
        graph = prepared.graphs[addresses]
        if graph is None:
            self._enqueue()
        else:
            self._stream.launch(graph)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            reasons = "; ".join(self._loaded.log.errors[-1:]) or "it gave no reason"
            raise RuntimeSettingError(f"TensorRT could not run the engine ({reasons})")


def free_set(prepared: Prepared, inputs: set[int]) -> int:
    """The set of output buffers to write: not the last one, and never one that is read.

    Raises:
        RuntimeSettingError: Both are read in this call.
    """
    for index in (1 - prepared.last, prepared.last):
        if inputs.isdisjoint(memory.address for memory in prepared.outputs[index].values()):
            return index
    raise RuntimeSettingError(
        "outputs of the last two calls are fed to one call, which leaves nowhere to write; bring "
        "one of them to the host first"
    )


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


def drop_graphs(prepared: Prepared) -> None:
    """Forget what was recorded."""
    for graph in prepared.graphs.values():
        if graph is not None:
            graph.close()
    prepared.graphs.clear()


def check_contract(stated: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Compare the manifest's tensors with the engine's.

    Raises:
        RuntimeSettingError: Names or element types differ.
    """
    types = {tensor.name: tensor.dtype for tensor in found}
    if {tensor.name: tensor.dtype for tensor in stated} != types:
        raise RuntimeSettingError(
            f"the engine has {', '.join(types)} and the manifest says "
            f"{', '.join(tensor.name for tensor in stated)}; build the engine again"
        )
