"""Do the numbers of a file make sense? Every value is looked at, with bounded memory, no torch.

A NaN in one matrix turns every picture grey or black, and no host says which file it came from. The
test works on bit patterns: a float is infinite or NaN where all bits of its exponent are set, and
doubling the pattern as an unsigned integer drops the sign, so one comparison with the doubled
exponent mask decides. That is the same for float64 as for float8, needs no bfloat16 in numpy, and
runs faster than the file is read.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.adapters.header import BITS, AdapterHeader, TensorInfo
from fewstep.adapters.names import parse_name, shown
from fewstep.errors import AdapterError

PIECE_BYTES = 16 * 1024 * 1024
"""What one thread reads at a time; smaller files need no other thread."""
NUM_THREADS = 4
CHUNK_BYTES = 512 * 1024
"""Fits the cache of one core together with the doubled copy."""
LORA_DTYPES = ("F64", "F32", "F16", "BF16")
"""What a matrix of a LoRA may be stored in; hosts read these four."""
ALPHA_DTYPES = (*LORA_DTYPES, "I64", "I32")
FIRST_BAD: dict[str, tuple[type[Any], int]] = {
    "F64": (np.uint64, 2 * 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 2 * 0x7F80_0000),
    "F16": (np.uint16, 2 * 0x7C00),
    "BF16": (np.uint16, 2 * 0x7F80),
    "F8_E5M2": (np.uint8, 2 * 0x7C),
    "F8_E4M3": (np.uint8, 2 * 0x7F),
}
"""dtype -> integer of its width, and the smallest doubled pattern that is not a finite number."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Tensors of one dtype that lie behind each other in the file, read as one."""

    dtype: str
    begin: int
    end: int

    def pieces(self) -> "Iterator[_Run]":
        """The same in parts of at most `PIECE_BYTES`."""
        for begin in range(self.begin, self.end, PIECE_BYTES):
            yield _Run(self.dtype, begin, min(begin + PIECE_BYTES, self.end))


def check_dtypes(header: AdapterHeader) -> None:
    """Check that every LoRA matrix is stored as floating point numbers that hosts read.

    Raises:
        AdapterError: Integers, booleans, complex numbers or 8-bit and smaller floats; the first
            such tensor is named.
    """
    for name, info in header.tensors.items():
        if info.dtype in LORA_DTYPES:
            continue
        if parse_name(name).part != "alpha" or info.dtype not in ALPHA_DTYPES:
            raise AdapterError(
                f"{header.path}: {shown(name)} is stored as {info.dtype}, which is no LoRA weight "
                f"({', '.join(LORA_DTYPES)}); convert the file to BF16 or F16"
            )


def check_values(header: AdapterHeader) -> None:
    """Check that every floating point number in the file is finite; reads the whole file.

    Raises:
        AdapterError: There is a NaN or an infinity; the first tensor that has one is named. Or the
            file has changed since its header was read.
    """
    try:
        end = max((info.offset + info.num_bytes for info in header.tensors.values()), default=0)
        size = os.stat(header.tensor_file).st_size
        # A part of a file (`kinds`) ends before the file does; a pickle's copy has its own size.
        has_changed = size < end or (header.copy is None and size != header.num_bytes)
        if header.tensors and has_changed:
            raise AdapterError(f"{header.path}: has changed while it was read; try again")
        pieces = [piece for run in _runs(header.tensors.values()) for piece in run.pieces()]
        if len(pieces) < 2:
            positions = [_first_bad(header, piece) for piece in pieces]
        else:  # reading and numpy both let other threads run
            with ThreadPoolExecutor(min(NUM_THREADS, os.cpu_count() or 1)) as threads:
                positions = list(threads.map(lambda piece: _first_bad(header, piece), pieces))
    except OSError as error:
        raise AdapterError(f"{header.path}: cannot be read ({error.strerror})") from error
    position = min((found for found in positions if found is not None), default=None)
    if position is not None:
        raise _not_finite(header, position)


def is_zero(header: AdapterHeader, name: str) -> bool:
    """Whether every byte of a tensor is zero, as in layers that were never trained.

    Raises:
        AdapterError: The file has changed since its header was read.
    """
    info = header.tensors[name]
    chunk = np.empty(min(CHUNK_BYTES, info.num_bytes), np.uint8)
    left = info.num_bytes
    try:
        with header.tensor_file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            while left:
                part = chunk[: min(len(chunk), left)]
                _fill(header, file, part.data)
                if part.any():
                    return False
                left -= len(part)
    except OSError as error:
        raise AdapterError(f"{header.path}: cannot be read ({error.strerror})") from error
    return True


def _runs(tensors: Iterable[TensorInfo]) -> Iterator[_Run]:
    dtype, begin, end = "", 0, 0
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.dtype not in FIRST_BAD or not info.num_bytes:
            continue
        if info.dtype == dtype and info.offset == end:
            end += info.num_bytes
            continue
        if end > begin:
            yield _Run(dtype, begin, end)
        dtype, begin, end = info.dtype, info.offset, info.offset + info.num_bytes
    if end > begin:
        yield _Run(dtype, begin, end)


def _first_bad(header: AdapterHeader, run: _Run) -> int | None:
    """Position in the file of the first number that is not finite."""
    kind, limit = FIRST_BAD[run.dtype]
    width = BITS[run.dtype] // 8
    chunk = np.empty(min(CHUNK_BYTES, run.end - run.begin) // width, kind)
    doubled = np.empty_like(chunk)
    with header.tensor_file.open("rb", buffering=0) as file:
        file.seek(run.begin)
        for position in range(run.begin, run.end, chunk.nbytes):
            count = min(len(chunk), (run.end - position) // width)
            _fill(header, file, chunk[:count].data.cast("B"))
            np.add(chunk[:count], chunk[:count], out=doubled[:count])
            if doubled[:count].max() >= limit:
                return position + width * int(np.argmax(doubled[:count] >= limit))
    return None


def _fill(header: AdapterHeader, file: Any, target: memoryview) -> None:
    while len(target):
        count = file.readinto(target)
        if not count:
            raise AdapterError(f"{header.path}: shrank while it was read; try again")
        target = target[count:]


def _not_finite(header: AdapterHeader, position: int) -> AdapterError:
    name, info = next(
        (name, info)
        for name, info in header.tensors.items()
        if info.offset <= position < info.offset + info.num_bytes
    )
    index = (position - info.offset) // (BITS[info.dtype] // 8)
    return AdapterError(
        f"{header.path}: {shown(name)} holds NaN or infinity (first at element {index} of "
        f"{info.dtype} {list(info.shape)}); the file is damaged or its training diverged, get "
        "another one"
    )
