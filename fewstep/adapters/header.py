"""The header of a safetensors file, read by hand: no torch, bounded memory, every lie caught.

    file = 8 bytes little-endian length | JSON header of that length | tensor bytes

Checked here: the lengths fit the file, the JSON is what the format says, and the tensors tile the
data without overlap or gap. A file that passes can be opened by any safetensors reader.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.adapters.names import shown
from fewstep.errors import AdapterError, RecipeError
from fewstep.recipe import METADATA_KEY, FewStepRecipe

MAX_HEADER_BYTES = 32 * 1024 * 1024
"""Real adapters have well under 4 MB, thumbnail included; more is damage or an attack."""
MAX_VALUES = 2_000_000
"""Values in the header's JSON; a tensor has about six. Each costs up to 100 bytes once parsed."""
MAX_DIMENSIONS = 16
MAX_MESSAGE = 500
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
SCALAR_FORMATS = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: safetensors' name: "F32", "F16", "BF16", ...
        shape: Sizes; () for a scalar.
        offset: Position of its first byte in the file.
        num_bytes: Length of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """A checked header: of a safetensors file, or of a pickle that holds nothing but tensors.

    Attributes:
        path: The file.
        num_bytes: Size of the whole file.
        metadata: The file's `__metadata__`, text to text; a pickle has none.
        tensors: Tensor name -> its info, in the order of the header.
        copy: The safetensors copy that a pickle's tensors are read from; None for other files.
    """

    path: Path
    num_bytes: int
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    copy: Path | None = None

    @property
    def container(self) -> Literal["safetensors", "pickle"]:
        """What the file is."""
        return "safetensors" if self.copy is None else "pickle"

    @property
    def tensor_file(self) -> Path:
        """The safetensors file that `tensors` gives the places in: the file, or its copy."""
        return self.copy or self.path

    def recipe(self) -> FewStepRecipe | None:
        """The recipe the file carries, or None.

        Raises:
            RecipeError: There is one, but it is not valid; the message names the file.
        """
        text = self.metadata.get(METADATA_KEY)
        if text is None:
            return None
        try:
            return FewStepRecipe.from_json(text)
        except RecipeError as error:
            raise type(error)(f"{self.path}: {_harmless(str(error))}") from error

    def read_scalars(self, names: Iterable[str]) -> dict[str, float]:
        """Values of one-element tensors, such as alphas; opens the file once.

        Raises:
            AdapterError: One is not a single number of a known type, or the file has changed.
        """
        values = {}
        try:
            with self.tensor_file.open("rb") as file:
                for name in names:
                    info = self.tensors[name]
                    file.seek(info.offset)
                    values[name] = _scalar(self.path, name, info, file.read(min(info.num_bytes, 8)))
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot be read ({error.strerror})") from error
        return values


def read_header(path: Path | str) -> AdapterHeader:
    """Read and check the header of a safetensors file.

    Raises:
        AdapterError: Missing, a pickle file, cut short, or not what the safetensors format says.
    """
    path = Path(path)
    raw, num_bytes = _read_raw(path)
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{path}: __metadata__ is not text to text; write the file again")
    start = 8 + len(raw)
    tensors = {name: _tensor(path, name, entry, start) for name, entry in content.items()}
    _check_tiling(path, tensors, start, num_bytes)
    return AdapterHeader(path, num_bytes, metadata, tensors)


def _harmless(message: str) -> str:
    """A sentence that may quote the file: printable, on one line, not endless."""
    text = "".join(c if c.isprintable() else "?" for c in message)
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


def _read_raw(path: Path) -> tuple[bytes, int]:
    if path.is_dir():
        raise AdapterError(f"{path}: this is a folder; give the .safetensors file in it")
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; check the path")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle(path)
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_lengths(path, start, length, num_bytes)
            raw = file.read(length)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) != length:
        raise AdapterError(f"{path}: the file shrank while it was read; try again")
    return raw, num_bytes


def _check_lengths(path: Path, start: bytes, length: int, num_bytes: int) -> None:
    if num_bytes == 0:
        raise AdapterError(f"{path}: the file is empty (0 bytes); download or save it again")
    # Only where the length is impossible: 80 02 is also how an honest length of 640 begins.
    if start.startswith(PICKLE_STARTS) and length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise _pickle(path)
    if num_bytes < 8:
        raise AdapterError(
            f"{path}: the file has {num_bytes} bytes, too few for safetensors; download it again"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path}: claims a header of {length} bytes (limit {MAX_HEADER_BYTES}), so it is not "
            "an intact safetensors file; download it again"
        )
    if length > num_bytes - 8:
        raise AdapterError(
            f"{path}: cut short inside its header ({num_bytes} bytes, the header alone needs "
            f"{length + 8}); download it again"
        )


def _pickle(path: Path) -> AdapterError:
    return AdapterError(
        f"{path}: this is a pickle file, which can run code when opened, and safetensors was "
        "expected here; convert it to .safetensors where you trust it"
    )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise AdapterError(
            f"{path}: the header has more than {MAX_VALUES} values, so it is not an intact "
            "safetensors file; download it again"
        )
    try:
        content = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
        if b"\\ud" in raw.lower():  # half a character: other readers refuse it
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise AdapterError(
            f"{path}: the header is not valid JSON ({reason}); this is not an intact safetensors "
            "file, download it again"
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: the header is not a JSON object; download the file again")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise AdapterError(f"{where} must have dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise AdapterError(
            f"{where} has the unknown dtype {shown(dtype)}; save it as F32, F16 or BF16"
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterError(f"{where} has the impossible shape {shown(shape)}; the file is damaged")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise AdapterError(f"{where} has the impossible data_offsets {shown(offsets)}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise AdapterError(
            f"{where} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes of data, "
            f"wanted {math.prod(shape) * BITS[dtype] // 8}; the file is damaged"
        )
    return TensorInfo(dtype, tuple(shape), start + begin, end - begin)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], start: int, num_bytes: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != position:
            kind = "overlaps another tensor" if info.offset < position else "leaves a gap before it"
            raise AdapterError(f"{path}: tensor {shown(name)} {kind}; the file is damaged")
        position += info.num_bytes
    if position > num_bytes:
        raise AdapterError(
            f"{path}: cut short, {num_bytes} of {position} bytes are there; download it again"
        )
    if position < num_bytes:
        raise AdapterError(
            f"{path}: has {num_bytes - position} bytes after its last tensor; download it again"
        )


def _scalar(path: Path, name: str, info: TensorInfo, data: bytes) -> float:
    dtype = info.dtype
    if dtype == "BF16":  # the upper half of a float32
        dtype, data = "F32", b"\0\0" + data
    value = math.nan
    if dtype in SCALAR_FORMATS and math.prod(info.shape) == 1 and len(data) * 8 == BITS[dtype]:
        value = float(struct.unpack(SCALAR_FORMATS[dtype], data)[0])
    if not math.isfinite(value):
        raise AdapterError(
            f"{path}: {shown(name)} of dtype {info.dtype} and shape {list(info.shape)} is not one "
            "finite number; the file is damaged"
        )
    return value
