"""What the stand-in for TensorRT does: an engine that runs its ONNX file with ONNX Runtime.

So the numbers that leave a session are real, and wrong buffers, stale graphs or lost weights show.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from tests.export.tensorrt.fake_cuda import HostGpu
from tests.export.tensorrt.fake_library import Behaviour

NUMPY = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.UINT8: ("UINT8", np.uint8),
}


class Holder:
    """The module, once it is made: behaviours need its enums."""

    trt: Any = None


def behaviours(gpu: HostGpu, holder: Holder) -> dict[str, Behaviour]:
    """ "Class.method" -> what it does."""
    return {
        **_building(holder),
        **_engine(holder),
        **_running(gpu, holder),
        **_refitting(holder),
    }


def _make(holder: Holder, name: str) -> Any:
    kind = getattr(holder.trt, name)
    return object.__new__(kind)


def _building(holder: Holder) -> dict[str, Behaviour]:
    def network(self: Any, flags: int) -> Any:
        made = _make(holder, "INetworkDefinition")
        made._flags, made._marked = flags, []
        return made

    def parse(self: Any, path: str) -> bool:
        self._network._path = path
        self._network._model = onnx.load(path)
        return True

    def parser(self: Any, net: Any, log: Any) -> None:
        self._network = net

    def get_input(self: Any, index: int) -> Any:
        made = _make(holder, "ITensor")
        made._name = self._model.graph.input[index].name
        return made

    def config(self: Any) -> Any:
        made = _make(holder, "IBuilderConfig")
        made._profiles, made._on, made._cache = [], {holder.trt.BuilderFlag.TF32}, None
        return made

    def profile(self: Any) -> Any:
        made = _make(holder, "IOptimizationProfile")
        made._shapes = {}
        return made

    def add_profile(self: Any, made: Any) -> int:
        self._profiles.append(made._shapes)
        return len(self._profiles) - 1

    def timing(self: Any, data: bytes) -> Any:
        made = _make(holder, "ITimingCache")
        made._data = data
        return made

    def set_timing(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._data not in (b"", b"timings"):
            return False
        self._cache = cache
        return True

    def build(self: Any, net: Any, made: Any) -> bytes | None:
        monitor = made.progress_monitor
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactics", "Building Engine", 3)
        goes_on = all([monitor.step_complete("Tactics", step) for step in range(3)])
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building Engine")
        if not goes_on:
            return None
        plan = {"onnx": net._path, "profiles": made._profiles, "marked": net._marked}
        return json.dumps(plan | {"flags": sorted(flag.name for flag in made._on)}).encode()

    def mark(self: Any, name: str) -> bool:
        if name not in {weight.name for weight in self._model.graph.initializer}:
            return False
        self._marked.append(name)
        return True

    return {
        "Builder.create_network": network,
        "Builder.create_builder_config": config,
        "Builder.create_optimization_profile": profile,
        "Builder.build_serialized_network": build,
        "INetworkDefinition.num_inputs": lambda self: len(self._model.graph.input),
        "INetworkDefinition.get_input": get_input,
        "INetworkDefinition.mark_weights_refittable": mark,
        "OnnxParser.__init__": parser,
        "OnnxParser.set_flag": lambda self, flag: None,
        "OnnxParser.parse_from_file": parse,
        "IBuilderConfig.set_flag": lambda self, flag: self._on.add(flag),
        "IBuilderConfig.clear_flag": lambda self, flag: self._on.discard(flag),
        "IBuilderConfig.set_memory_pool_limit": lambda self, pool, size: None,
        "IBuilderConfig.add_optimization_profile": add_profile,
        "IBuilderConfig.create_timing_cache": timing,
        "IBuilderConfig.set_timing_cache": set_timing,
        "IBuilderConfig.get_timing_cache": lambda self: self._cache,
        "ITimingCache.serialize": lambda self: b"timings",
        "IOptimizationProfile.set_shape": lambda self, name, *shapes: self._shapes.update(
            {name: shapes}
        ),
    }


def _engine(holder: Holder) -> dict[str, Behaviour]:
    def deserialize(self: Any, data: bytes) -> Any:
        if not data.startswith(b"{"):
            return None
        engine = _make(holder, "ICudaEngine")
        engine._plan = json.loads(data)
        engine._model = onnx.load(engine._plan["onnx"])
        graph = engine._model.graph
        engine._values = {value.name: value for value in (*graph.input, *graph.output)}
        engine._inputs = {value.name for value in graph.input}
        engine._session = session(engine._model)
        return engine

    def dtype(self: Any, name: str) -> Any:
        kind = self._values[name].type.tensor_type.elem_type
        return holder.trt.DataType[NUMPY[kind][0]]

    def shape(self: Any, name: str) -> list[int]:
        dims = self._values[name].type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]

    def mode(self: Any, name: str) -> Any:
        kinds = holder.trt.TensorIOMode
        return kinds.INPUT if name in self._inputs else kinds.OUTPUT

    def context(self: Any) -> Any:
        made = _make(holder, "IExecutionContext")
        made._engine, made._shapes, made._addresses = self, {}, {}
        return made

    return {
        "Runtime.deserialize_cuda_engine": deserialize,
        "ICudaEngine.streamable_weights_size": lambda self: 0,
        "ICudaEngine.num_io_tensors": lambda self: len(self._values),
        "ICudaEngine.num_optimization_profiles": lambda self: len(self._plan["profiles"]),
        "ICudaEngine.get_tensor_name": lambda self, index: list(self._values)[index],
        "ICudaEngine.get_tensor_mode": mode,
        "ICudaEngine.get_tensor_location": lambda self, name: holder.trt.TensorLocation.DEVICE,
        "ICudaEngine.get_tensor_dtype": dtype,
        "ICudaEngine.get_tensor_shape": shape,
        "ICudaEngine.get_tensor_profile_shape": lambda self, name, index: self._plan["profiles"][
            index
        ][name],
        "ICudaEngine.create_execution_context": context,
    }


def _running(gpu: HostGpu, holder: Holder) -> dict[str, Behaviour]:
    def set_shape(self: Any, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def set_address(self: Any, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def shape(self: Any, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        feeds = {n: np.zeros(s, numpy_type(self, n)) for n, s in self._shapes.items()}
        outputs = self._engine._session.run([name], feeds)
        return tuple(outputs[0].shape)

    def execute(self: Any, stream: int) -> bool:
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        inputs = {addresses[name] for name in shapes}
        outputs = {addresses[name] for name in self._engine._values if name not in shapes}
        assert inputs.isdisjoint(outputs), "an input's address is an output's address"
        assert (inputs | outputs) <= gpu.blocks.keys(), "an address was freed or never allocated"

        def work() -> None:
            # A recorded graph keeps shapes and addresses; weights are read where they lie.
            feeds = {
                name: view(gpu, addresses[name], numpy_type(self, name), s).copy()
                for name, s in shapes.items()
            }
            for name in addresses.keys() - shapes.keys():
                (value,) = self._engine._session.run([name], feeds)
                view(gpu, addresses[name], value.dtype, value.shape)[...] = value

        gpu.do(work)
        return True

    return {
        "IExecutionContext.set_optimization_profile_async": lambda self, index, stream: True,
        "IExecutionContext.set_input_shape": set_shape,
        "IExecutionContext.set_tensor_address": set_address,
        "IExecutionContext.infer_shapes": lambda self: [],
        "IExecutionContext.get_tensor_shape": shape,
        "IExecutionContext.execute_async_v3": execute,
    }


def _refitting(holder: Holder) -> dict[str, Behaviour]:
    def refitter(self: Any, engine: Any, log: Any) -> None:
        self._engine, self._new = engine, {}

    def weights(self: Any, dtype: Any, address: int, size: int) -> None:
        self._dtype, self._address, self._size = dtype, address, size
        self._nbytes = size * 4

    def prototype(self: Any, name: str) -> Any:
        stored = next(w for w in self._engine._model.graph.initializer if w.name == name)
        return holder.trt.Weights(holder.trt.DataType.FLOAT, 0, int(np.prod(stored.dims)))

    def set_named(self: Any, name: str, new: Any, location: Any) -> bool:
        self._new[name] = new
        return True

    def missing(self: Any) -> list[str]:
        marked = self._engine._plan["marked"]
        return [name for name in marked if name not in self._new] if self._new else []

    def apply(self: Any, stream: int) -> bool:
        for stored in self._engine._model.graph.initializer:
            if stored.name in self._new:
                new = self._new[stored.name]
                pointer = (ctypes.c_float * new._size).from_address(new._address)
                stored.raw_data = np.frombuffer(pointer, np.float32).tobytes()
        self._engine._session = session(self._engine._model)
        return True

    return {
        "Refitter.__init__": refitter,
        "Refitter.get_all_weights": lambda self: self._engine._plan["marked"],
        "Refitter.get_weights_prototype": prototype,
        "Refitter.set_named_weights": set_named,
        "Refitter.get_missing_weights": missing,
        "Refitter.refit_cuda_engine_async": apply,
        "Weights.__init__": weights,
    }


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session over a model in memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def numpy_type(context: Any, name: str) -> Any:
    """Of an input or output."""
    return NUMPY[context._engine._values[name].type.tensor_type.elem_type][1]


def view(gpu: HostGpu, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array over a block."""
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(gpu.blocks[address], dtype, count).reshape(shape)


def model_path(folder: Path) -> Path:
    """Where the graph of a component lies."""
    return folder / "transformer" / "model.onnx"
