"""Memory, streams and graphs of CUDA through NVIDIA's own bindings (package cuda-bindings).

Every call of the bindings returns a tuple with the error first; here errors become exceptions.
"""

import logging
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fewstep.errors import MissingExtraError, RuntimeSettingError

logger = logging.getLogger(__name__)


def runtime() -> Any:
    """The bindings of CUDA's runtime library.

    Raises:
        MissingExtraError: They are not installed.
    """
    try:
        from cuda.bindings import runtime as cudart  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise MissingExtraError("cuda-bindings", "tensorrt") from None
    return cudart


def checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a call, or its error as an exception.

    Args:
        result: Error first, then values.
        what: Names the call in the message.

    Raises:
        RuntimeSettingError: The call failed.
    """
    cudart = runtime()
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        raise RuntimeSettingError(f"CUDA could not {what}: {explanation(error)}")
    return values[0] if values else None


def explanation(error: Any) -> str:
    """CUDA's own words for an error."""
    _, text = runtime().cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


def device_count() -> int:
    """Number of GPUs.

    Raises:
        RuntimeSettingError: There is no driver, or it is too old.
    """
    cudart = runtime()
    error, count = cudart.cudaGetDeviceCount()
    if error == cudart.cudaError_t.cudaErrorNoDevice:
        return 0
    if error != cudart.cudaError_t.cudaSuccess:
        raise RuntimeSettingError(
            f"no CUDA GPU can be used here ({explanation(error)}); TensorRT engines need one: use "
            'provider "cpu", or install the driver'
        )
    return int(count)


def architecture(device: int) -> str:
    """Compute capability of a GPU as "sm90"."""
    cudart = runtime()
    attribute = cudart.cudaDeviceAttr
    parts = [
        checked(cudart.cudaDeviceGetAttribute(name, device), "ask for the GPU's architecture")
        for name in (
            attribute.cudaDevAttrComputeCapabilityMajor,
            attribute.cudaDevAttrComputeCapabilityMinor,
        )
    ]
    return f"sm{parts[0]}{parts[1]}"


def runtime_major() -> int:
    """Major version of the CUDA runtime, 13."""
    return int(checked(runtime().cudaRuntimeGetVersion(), "say its version")) // 1000


def use_device(device: int) -> None:
    """Make a GPU the calling thread's current one."""
    checked(runtime().cudaSetDevice(device), f"use device {device}")


class Stream:
    """A queue of work of its own, never the default stream, which cannot be captured."""

    def __init__(self) -> None:
        cudart = runtime()
        self._stream = checked(
            cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "make a stream"
        )

    @property
    def handle(self) -> int:
        """What TensorRT takes."""
        return int(self._stream)

    def wait(self) -> None:
        """Until all queued work is done."""
        checked(runtime().cudaStreamSynchronize(self._stream), "finish its work")

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the GPU; it must stay alive until `wait`."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, array.nbytes, kind)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from the GPU into a contiguous array; it is filled after `wait`."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, address, array.nbytes, kind)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        copy = runtime().cudaMemcpyAsync(target, source, nbytes, kind, self._stream)
        checked(copy, "copy memory")

    def capture(self, work: Callable[[], None]) -> "Graph | None":
        """Record the work as a graph instead of doing it.

        Returns:
            The graph; None where this work cannot be recorded, which is no error.
        """
        cudart = runtime()
        # Only this thread's calls are watched: other sessions go on.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(cudart.cudaStreamBeginCapture(self._stream, mode), "begin a graph")
        try:
            work()
        except RuntimeSettingError as error:
            cudart.cudaStreamEndCapture(self._stream)
            logger.warning("this engine runs without a CUDA graph: %s", error)
            return None
        error, graph = cudart.cudaStreamEndCapture(self._stream)
        if error != cudart.cudaError_t.cudaSuccess:
            logger.warning("this engine runs without a CUDA graph: %s", explanation(error))
            return None
        try:
            made = checked(cudart.cudaGraphInstantiate(graph, 0), "make a graph")
        finally:
            checked(cudart.cudaGraphDestroy(graph), "free a graph")
        return Graph(made)

    def launch(self, graph: "Graph") -> None:
        """Queue a recorded graph."""
        checked(runtime().cudaGraphLaunch(graph.handle, self._stream), "run a graph")

    def close(self) -> None:
        """Give the stream back."""
        checked(runtime().cudaStreamDestroy(self._stream), "free a stream")


class Graph:
    """A recorded, launchable graph.

    Args:
        handle: From `cudaGraphInstantiate`.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def close(self) -> None:
        """Give it back."""
        checked(runtime().cudaGraphExecDestroy(self.handle), "free a graph")


class Memory:
    """A block of GPU memory.

    Args:
        nbytes: Size; an empty tensor still gets an address of its own.

    Attributes:
        nbytes: Size.
        address: On the GPU.
        is_closed: It was given back; the address is another's now.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.is_closed = False
        what = f"allocate {nbytes} bytes on the GPU"
        self.address = int(checked(runtime().cudaMalloc(max(nbytes, 1)), what))

    def close(self) -> None:
        """Give it back."""
        self.is_closed = True
        checked(runtime().cudaFree(self.address), "free memory")
