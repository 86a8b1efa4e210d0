"""Runs one engine: buffers and a CUDA graph per shape.

Outputs live in two sets of buffers used in turn, so an output can be fed to the next call without
leaving the GPU, and no call ever reads and writes the same memory. A recorded graph holds shapes
and addresses, so it is used for exactly those and dropped when weights change. Buffers and graphs
of the shapes used last are kept (`buffers.KEPT_SHAPES`), those of others given back.

Engine build and run are not verified on this release (docs/tensorrt.md).
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.manifest import Graph, Tensor
from fewstep.runtime.tensorrt import cuda, engine
from fewstep.runtime.tensorrt.buffers import (
    DeviceArray,
    Feed,
    Prepared,
    Shape,
    ShapeStore,
    allocate,
    as_feed,
    to_host,
)

PROVIDER = "tensorrt-native"


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
        self._shapes = ShapeStore()
        self._lock = threading.Lock()

    @property
    def num_graphs(self) -> int:
        """CUDA graphs held: two per combination of shapes where all values come from the host."""
        with self._lock:
            graphs = [graph for prepared in self._shapes for graph in prepared.graphs.values()]
        return sum(graph is not None for graph in graphs)

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
            for prepared in self._shapes:
                prepared.drop_graphs()

    def close(self) -> None:
        """Free what the session holds on the GPU; it cannot be used afterwards."""
        with self._lock:
            self._stream.wait()
            self._shapes.clear()
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
        index = prepared.free_set(set(addresses.values()))
        outputs = prepared.outputs[index]
        self._point(prepared, addresses, outputs)
        for name, array in arrays.items():
            if not isinstance(array, DeviceArray):
                self._stream.upload(array, addresses[name])
        self._execute(prepared, (*addresses.values(), *(m.address for m in outputs.values())))
        prepared.last = index
        return {
            tensor.name: DeviceArray(tensor, prepared.shapes[tensor.name], outputs[tensor.name])
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
        self._stream.wait()  # a call that failed midway may still run
        return self._shapes.get(key, lambda: self._allocate(shapes))

    def _allocate(self, shapes: dict[str, Shape]) -> Prepared:
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
        return allocate(self.graph.inputs, self.graph.outputs, shapes, results)

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
            prepared.keep_graph(addresses, self._stream.capture(self._enqueue))
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
