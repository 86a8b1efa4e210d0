"""A deserialised engine: its inputs and outputs, its profiles, and its weights.

Engine build and run are not verified on this release (docs/tensorrt.md).
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.manifest import ElementType, Tensor
from fewstep.runtime.tensorrt.identity import InputRange, Profile
from fewstep.runtime.tensorrt.library import CudaEngine, LogBase, Refitter, Runtime, library
from fewstep.runtime.tensorrt.weight_names import held_names
from fewstep.runtime.weight_forms import stored_value

logger = logging.getLogger(__name__)

ELEMENT_TYPES: dict[str, ElementType] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's names of element types -> ours."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine with what keeps it alive.

    Attributes:
        engine: TensorRT's object.
        runtime: Made it, and must outlive it.
        log: Receives its messages, and must outlive both.
    """

    engine: CudaEngine
    runtime: Runtime
    log: LogBase


def load_engine(plan: bytes, *, weight_budget_bytes: int | None = None) -> LoadedEngine:
    """Deserialise a plan.

    Args:
        plan: Content of engine.plan.
        weight_budget_bytes: GPU memory for weights of an engine built with weight streaming; the
            rest stays in host memory. None lets TensorRT choose.

    Raises:
        RuntimeSettingError: TensorRT refuses the plan, or it has no weights to stream.
    """
    trt = library()

    log = make_log()
    runtime = started(trt.Runtime, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeSettingError(
            f"TensorRT refused the plan ({'; '.join(log.errors) or 'it gave no reason'}); it was "
            "made by another release or for another GPU: build it again here"
        )
    if engine.streamable_weights_size > 0:
        automatic = engine.get_weight_streaming_automatic_budget()
        budget = automatic if weight_budget_bytes is None else weight_budget_bytes
        engine.weight_streaming_budget_v2 = min(budget, engine.streamable_weights_size)
    elif weight_budget_bytes is not None:
        raise RuntimeSettingError(
            "a weight budget was given and this engine was built without weight streaming; build "
            "it with --weight-streaming, or give no budget"
        )
    return LoadedEngine(engine, runtime, log)


def started(factory: Callable[[LogBase], Any], log: LogBase) -> Any:
    """Make one of TensorRT's roots.

    Args:
        factory: `trt.Builder` or `trt.Runtime`.
        log: From `make_log`.

    Raises:
        RuntimeSettingError: Its libraries could not start.
    """
    try:
        return factory(log)
    except TypeError as error:  # how the bindings say that the library gave them nothing
        reasons = "; ".join(log.errors) or str(error)
        raise RuntimeSettingError(
            f"TensorRT's libraries did not start ({reasons}); see that the GPU's driver works "
            "(nvidia-smi) and that all TensorRT packages have one version"
        ) from None


def make_log() -> Any:
    """A TensorRT logger that hands messages to `logging` and keeps the errors.

    Returns:
        A `trt.ILogger` with a list `errors`.
    """
    trt = library()

    loud = {
        trt.ILogger.Severity.INTERNAL_ERROR,
        trt.ILogger.Severity.ERROR,
    }

    class Log(trt.ILogger):
        """Messages of one engine."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from its own threads too."""
            if severity in loud:
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.info("TensorRT: %s", msg)

    return Log()


def tensors(engine: CudaEngine, *, are_inputs: bool) -> tuple[Tensor, ...]:
    """Inputs or outputs in the engine's order.

    Raises:
        RuntimeSettingError: One has an element type without a place in numpy, or lies in host
            memory, as inputs do that hold a shape.
    """
    trt = library()

    wanted = trt.TensorIOMode.INPUT if are_inputs else trt.TensorIOMode.OUTPUT
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = []
    for name in names:
        if engine.get_tensor_mode(name) != wanted:
            continue
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise RuntimeSettingError(
                f"{name} of this engine holds a shape and must lie in host memory, which fewstep "
                "does not feed; export the graph with sizes taken from its other inputs"
            )
        kind = engine.get_tensor_dtype(name).name
        if kind not in ELEMENT_TYPES:
            raise RuntimeSettingError(
                f"{name} of this engine is {kind}, which numpy cannot hold; build it from a graph "
                f"with inputs and outputs among {', '.join(ELEMENT_TYPES.values())}"
            )
        shape = tuple(engine.get_tensor_shape(name))
        dims = tuple(
            str(size) if size >= 0 else f"{name}_{axis}" for axis, size in enumerate(shape)
        )
        found.append(Tensor(name=name, dtype=ELEMENT_TYPES[kind], dims=dims))
    return tuple(found)


def profiles(engine: CudaEngine) -> tuple[Profile, ...]:
    """Ranges the engine was built for."""
    inputs = tensors(engine, are_inputs=True)
    return tuple(
        Profile(ranges=tuple(_range(engine, tensor.name, index) for tensor in inputs))
        for index in range(engine.num_optimization_profiles)
    )


def _range(engine: CudaEngine, name: str, profile: int) -> InputRange:
    smallest, usual, largest = engine.get_tensor_profile_shape(name, profile)
    return InputRange(name=name, min=tuple(smallest), opt=tuple(usual), max=tuple(largest))


def choose_profile(found: tuple[Profile, ...], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Index of the profile that holds the shapes and was tuned nearest to them.

    Raises:
        RuntimeSettingError: None holds them; the message names the input and its range.
    """
    holding = [index for index, profile in enumerate(found) if profile.holds(shapes)]
    if not holding:
        wrong = [r for r in found[0].ranges if not r.holds(shapes[r.name])]
        outside = wrong[0] if wrong else found[0].ranges[0]
        raise RuntimeSettingError(
            f"{outside.name} has shape {shapes[outside.name]} and this engine was built for "
            f"{outside.min} to {outside.max}; use a size inside, or build an engine for this one"
        )
    return min(holding, key=lambda index: _distance(found[index], shapes))


def _distance(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(
        abs(size - usual)
        for entry in profile.ranges
        for size, usual in zip(shapes[entry.name], entry.opt, strict=True)
    )


def refit_from_onnx(loaded: LoadedEngine, file: Path) -> None:
    """Give an engine the weights of an ONNX file with the same weight names.

    For plans that were stripped of weights, and for another adapter: export it from the same base,
    and refit from its model.onnx.

    Raises:
        RuntimeSettingError: A weight is missing or has another shape.
    """
    trt = library()

    refitter = trt.Refitter(loaded.engine, loaded.log)
    parser = trt.OnnxParserRefitter(refitter, loaded.log)
    if not parser.refit_from_file(str(file)):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RuntimeSettingError(
            f"the engine cannot take the weights of {file} ({'; '.join(reasons)}); it must be an "
            "export of the same base with the same opset and precision"
        )
    _finish(refitter, None)


def refit(
    loaded: LoadedEngine, weights: Mapping[str, NDArray[Any]], stream: int
) -> dict[str, NDArray[Any]]:
    """Replace weights by the names of their parameters.

    Args:
        loaded: Built with these weights marked refittable.
        weights: Parameter of the network -> new values, in the element type the engine has.
            Where the graph stores it in another form (`weight_forms`), it is brought into that.
        stream: CUDA stream to work on.

    Returns:
        The arrays TensorRT reads; keep them until the stream is synchronised.

    Raises:
        RuntimeSettingError: A name is unknown or fixed, or type or size differ.
    """
    trt = library()

    refitter = trt.Refitter(loaded.engine, loaded.log)
    arrays = stored_weights(weights, set(refitter.get_all_weights()))
    for name, array in arrays.items():
        prototype = refitter.get_weights_prototype(name)
        if array.size != prototype.size or array.nbytes != prototype.nbytes:
            raise RuntimeSettingError(
                f"weight {name} has {array.size} values in {array.nbytes} bytes and the engine "
                f"wants {prototype.size} in {prototype.nbytes}; give it in the engine's precision"
            )
        new = trt.Weights(prototype.dtype, array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, new, trt.TensorLocation.HOST):
            raise RuntimeSettingError(f"TensorRT refused the new values of {name}")
    _finish(refitter, stream)
    return arrays


def stored_weights(
    weights: Mapping[str, NDArray[Any]], known: Collection[str]
) -> dict[str, NDArray[Any]]:
    """Weights by the names of the graph, contiguous.

    Args:
        weights: Parameter -> values.
        known: Names in the engine.

    Raises:
        RuntimeSettingError: A parameter is under none of its names.
    """
    found = {}
    for name, values in weights.items():
        stored = held_names(name, known)
        if not stored:
            raise RuntimeSettingError(
                f"the engine has no refittable weight {name}; build it with --refit and an adapter "
                "that changes this weight"
            )
        found |= {one: stored_value(one, values) for one in stored}
    return found


def _finish(refitter: Refitter, stream: int | None) -> None:
    missing = refitter.get_missing_weights()
    if missing:
        raise RuntimeSettingError(
            f"{len(missing)} weights depend on the replaced ones and were not given, {missing[0]} "
            "first; give all weights the adapter changes"
        )
    done = (
        refitter.refit_cuda_engine()
        if stream is None
        else (refitter.refit_cuda_engine_async(stream))
    )
    if not done:
        raise RuntimeSettingError("TensorRT could not refit the engine; build it again")
