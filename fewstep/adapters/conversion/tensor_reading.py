"""Tensors of a file one at a time, from the places its header gives: any container, nothing run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]


def open_tensors(header: AdapterHeader) -> Read:
    """A function that reads one tensor of the file by name, from the place its header gives.

    Raises:
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch") from error
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }

    def read(name: str) -> "torch.Tensor":
        info = header.tensors[name]
        if info.dtype not in kinds:
            raise AdapterError(
                f"{header.path}: {shown(name)} is {info.dtype}, wanted floats; save it as F32, "
                "F16 or BF16"
            )
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=kinds[info.dtype])
        try:
            with header.tensor_file.open("rb") as file:
                file.seek(info.offset)
                data = bytearray(file.read(info.num_bytes))
        except OSError as error:
            raise AdapterError(f"{header.path}: cannot be read ({error.strerror})") from error
        if len(data) != info.num_bytes:
            raise AdapterError(f"{header.path}: the file shrank while it was read; try again")
        return torch.frombuffer(data, dtype=kinds[info.dtype]).reshape(info.shape)

    return read
