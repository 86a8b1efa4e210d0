"""A stand-in for `cuda.bindings.runtime` on host memory, with the real bindings' names only.

Streams run at once, except while a graph is recorded: then work is kept and done at every launch,
with the addresses it was recorded with, as on a GPU.
"""

import ctypes
import enum
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tests.export.tensorrt.fake_library import surface

CUDA_VERSIONS = ("12.9.10", "13.5.0")
ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr")


class HostGpu:
    """Memory and streams.

    Attributes:
        blocks: Address -> buffer, for every block that is not freed.
        graphs: Those made and not destroyed.
        recorded: Work of the graph being recorded; None outside.
        launches: Number of graph launches.
        captures: Number of graphs made.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recorded: list[Callable[[], None]] | None = None
        self.launches = 0
        self.captures = 0

    def do(self, work: Callable[[], None]) -> None:
        """Now, or at every launch."""
        if self.recorded is None:
            work()
        else:
            self.recorded.append(work)

    def allocate(self, nbytes: int) -> int:
        """A block's address."""
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Both ends must be known or lie in the host's arrays."""
        assert self.recorded is None, "copies between host and GPU must not be recorded"
        ctypes.memmove(target, source, nbytes)


def fake_runtime(version: str, gpu: HostGpu, *, sm: tuple[int, int] = (9, 0)) -> ModuleType:
    """The module; names it has and the real one has not fail here."""
    names = surface("cuda-runtime", version)
    module: Any = ModuleType("cuda.bindings.runtime")
    for name in ENUMS:
        setattr(module, name, enum.IntEnum(name, names["classes"][name]["enum"], start=0))
    ok = module.cudaError_t.cudaSuccess
    attribute = module.cudaDeviceAttr

    def begin(stream: int, mode: Any) -> tuple[Any, ...]:
        gpu.recorded = []
        return (ok,)

    def end(stream: int) -> tuple[Any, ...]:
        work, gpu.recorded = gpu.recorded, None
        return ok, work

    def launch(graph: int, stream: int) -> tuple[Any, ...]:
        gpu.launches += 1
        for work in gpu.graphs[graph]:
            work()
        return (ok,)

    def instantiate(graph: Any, flags: int) -> tuple[Any, ...]:
        gpu.captures += 1
        gpu.graphs[gpu.captures] = list(graph)
        return ok, gpu.captures

    def destroy(graph: int) -> tuple[Any, ...]:
        del gpu.graphs[graph]
        return (ok,)

    def copy(target: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any, ...]:
        gpu.copy(target, source, nbytes)
        return (ok,)

    def free(address: int) -> tuple[Any, ...]:
        del gpu.blocks[address]
        return (ok,)

    def ask(name: Any, device: int) -> tuple[Any, ...]:
        is_major = name == attribute.cudaDevAttrComputeCapabilityMajor
        return ok, sm[0] if is_major else sm[1]

    functions: dict[str, Callable[..., tuple[Any, ...]]] = {
        "cudaGetErrorString": lambda error: (ok, str(error).encode()),
        "cudaGetDeviceCount": lambda: (ok, 1),
        "cudaDeviceGetAttribute": ask,
        "cudaRuntimeGetVersion": lambda: (ok, int(version.split(".")[0]) * 1000),
        "cudaSetDevice": lambda device: (ok,),
        "cudaStreamCreateWithFlags": lambda flags: (ok, 77),
        "cudaStreamSynchronize": lambda stream: (ok,),
        "cudaStreamDestroy": lambda stream: (ok,),
        "cudaMemcpyAsync": copy,
        "cudaStreamBeginCapture": begin,
        "cudaStreamEndCapture": end,
        "cudaGraphInstantiate": instantiate,
        "cudaGraphLaunch": launch,
        "cudaGraphDestroy": lambda graph: (ok,),
        "cudaGraphExecDestroy": destroy,
        "cudaMalloc": lambda nbytes: (ok, gpu.allocate(nbytes)),
        "cudaFree": free,
    }
    module.cudaStreamNonBlocking = 1
    known = {*names["functions"], *names["values"]}
    assert functions.keys() | {"cudaStreamNonBlocking"} <= known
    for name, function in functions.items():
        setattr(module, name, function)
    return module
