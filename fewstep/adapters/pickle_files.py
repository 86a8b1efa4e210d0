"""Adapters in torch's own format (.pt, .bin, .ckpt, .pth): read without torch, nothing executed.

    since torch 1.6   a zip archive, nothing compressed: NAME/data.pkl, NAME/data/0, NAME/data/1
    before            five pickles in a row, then for each storage its length and its bytes

In both the numbers lie in the file as they are, so a tensor is an offset, a shape and a dtype: the
same header as a safetensors file has, and whatever reads values through it does not see the
difference. `safetensors_copy` writes such a file out for hosts that want safetensors.
"""

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fewstep.adapters.header import BITS, AdapterHeader, TensorInfo
from fewstep.adapters.names import shown
from fewstep.adapters.pickle_machine import is_pickle_start, read_pickle
from fewstep.adapters.pickle_records import RefusedPickleError, StorageRecord, TensorRecord
from fewstep.errors import AdapterError

MAX_PICKLE_BYTES = 16 * 1024 * 1024
"""Of instructions; a tensor takes about 200."""
MAX_LIST_BYTES = 4 * 1024 * 1024
"""Of a zip's list of files; a tensor takes about 100."""
ZIP_START = b"PK\x03\x04"
ZIP_HEADER_BYTES = 30
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
NESTED = "state_dict"
RESERVED = "__metadata__"
PLAIN = (str, int, float, type(None))


def read_pickle_file(path: Path) -> AdapterHeader:
    """Header of a dictionary of tensors that torch.save wrote, flat or under "state_dict".

    Raises:
        AdapterError: Not such a file, damaged, or it would run code.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            if num_bytes == 0:
                raise RefusedPickleError("is empty (0 bytes)")
            if start.startswith(ZIP_START):
                tensors = _read_zip(file, num_bytes)
            elif is_pickle_start(start):
                tensors = _read_legacy(file, num_bytes)
            else:
                raise AdapterError(
                    f"{path}: is no pickle in spite of its name; rename it if it is a .safetensors "
                    "file, else download it again"
                )
    except RefusedPickleError as refusal:
        raise AdapterError(
            f"{path}: this pickle file {refusal}; where you trust it, load it with torch and save "
            "its tensors as .safetensors"
        ) from refusal
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    return AdapterHeader(path, num_bytes, {}, tensors, container="pickle")


@dataclass(slots=True)
class _Reader:
    """A file of which only so much is read, whatever lengths it claims."""

    file: BinaryIO
    left: int

    def read(self, size: int = -1, /) -> bytes:
        return self._counted(
            self.file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        )

    def readline(self, size: int = -1, /) -> bytes:
        return self._counted(self.file.readline(self.left + 1))

    def seek(self, position: int, whence: int = 0, /) -> int:
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise RefusedPickleError("claims more tensors than any real file has, or is damaged")
        return data


def _read_zip(file: BinaryIO, num_bytes: int) -> dict[str, TensorInfo]:
    entries = _entries(file)
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    folder = programs[0].removesuffix("data.pkl") if len(programs) == 1 else ""
    if not folder or not all(name.startswith(folder) for name in entries):
        raise RefusedPickleError("is a zip archive that torch.save did not write, or is damaged")
    order = entries.get(f"{folder}byteorder")
    if order is not None and _entry_bytes(file, order, num_bytes, 16) != b"little":
        raise RefusedPickleError("was written on a machine with another byte order")
    program = _entry_bytes(file, entries[programs[0]], num_bytes, MAX_PICKLE_BYTES)
    tensors = flat_tensors(read_pickle(io.BytesIO(program)))
    positions: dict[str, int] = {}
    for tensor in tensors.values():
        key = tensor.storage.key
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.file_size < _storage_bytes(tensor.storage):
            raise RefusedPickleError(f"lacks numbers of its storage {shown(key)}, so it is damaged")
        if key not in positions:
            positions[key] = _entry_start(file, entry, num_bytes)
    return _infos(tensors, positions, num_bytes)


def _entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        archive = zipfile.ZipFile(cast(BinaryIO, _Reader(file, MAX_LIST_BYTES)))
        listed = archive.infolist()
    except RefusedPickleError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise RefusedPickleError("is a damaged zip archive") from error
    entries = {entry.filename: entry for entry in listed}
    if len(entries) != len(listed):
        raise RefusedPickleError("lists a name twice in its zip archive, so it is damaged")
    return entries


def _entry_start(file: BinaryIO, entry: zipfile.ZipInfo, num_bytes: int) -> int:
    """Position of an entry's bytes, which must lie in the file as they are."""
    name = shown(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise RefusedPickleError(f"has {name} compressed or encrypted, as torch.save never does")
    if not 0 <= entry.header_offset <= num_bytes - ZIP_HEADER_BYTES:
        raise RefusedPickleError(f"is cut short before {name}")
    file.seek(entry.header_offset)
    header = file.read(ZIP_HEADER_BYTES)
    if not header.startswith(ZIP_START):
        raise RefusedPickleError(f"has no {name} where its zip archive says, so it is damaged")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + ZIP_HEADER_BYTES + name_length + extra_length
    if start + entry.file_size > num_bytes:
        raise RefusedPickleError(f"is cut short in {name}")
    return start


def _entry_bytes(file: BinaryIO, entry: zipfile.ZipInfo, num_bytes: int, limit: int) -> bytes:
    if entry.file_size > limit:
        raise RefusedPickleError(f"has {entry.file_size} bytes in {shown(entry.filename)}")
    file.seek(_entry_start(file, entry, num_bytes))
    return file.read(entry.file_size)


def _read_legacy(file: BinaryIO, num_bytes: int) -> dict[str, TensorInfo]:
    stream = _Reader(file, MAX_PICKLE_BYTES)
    if read_pickle(stream) != LEGACY_MAGIC or read_pickle(stream) != LEGACY_PROTOCOL:
        raise RefusedPickleError("is not in a format of torch.save")
    system = read_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedPickleError("was written on a machine with another byte order")
    tensors = flat_tensors(read_pickle(stream))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    positions: dict[str, int] = {}
    keys = read_pickle(stream)
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages or key in positions:
            raise RefusedPickleError("has numbers of a storage that no tensor has")
        count = int.from_bytes(file.read(8), "little")
        if count != storages[key].count:
            raise RefusedPickleError(f"has another length of storage {shown(key)} than it claims")
        positions[key] = file.tell()
        if positions[key] + _storage_bytes(storages[key]) > num_bytes:
            raise RefusedPickleError(f"is cut short in its storage {shown(key)}")
        file.seek(_storage_bytes(storages[key]), io.SEEK_CUR)
    if set(positions) != set(storages):
        raise RefusedPickleError("lacks the numbers of some tensors")
    return _infos(tensors, positions, num_bytes)


def flat_tensors(content: object) -> dict[str, TensorRecord]:
    """Name -> tensor of a dictionary of tensors, which may be the "state_dict" of another.

    Raises:
        RefusedPickleError: It is anything else.
    """
    if isinstance(content, dict) and isinstance(content.get(NESTED), dict):
        beside = [name for name in content if name != NESTED]
        held = [name for name in beside if not isinstance(content[name], PLAIN)]
        if held:
            raise RefusedPickleError(
                f"has {shown(held[0])} beside its {NESTED!r}, and which of them counts is unknown"
            )
        content = content[NESTED]
    if not isinstance(content, dict) or not content:
        raise RefusedPickleError("holds no dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, TensorRecord) or name == RESERVED:
            raise RefusedPickleError(
                f"holds {shown(name)}, which is not a tensor, among its tensors"
            )
    return content


def _infos(
    tensors: Mapping[str, TensorRecord], positions: Mapping[str, int], num_bytes: int
) -> dict[str, TensorInfo]:
    infos = {}
    total = 0
    for name, tensor in tensors.items():
        width = BITS[tensor.storage.dtype] // 8
        start = positions[tensor.storage.key] + tensor.start * width
        infos[name] = TensorInfo(tensor.storage.dtype, tensor.shape, start, tensor.count * width)
        total += tensor.count * width
    if total > num_bytes:  # tensors may share numbers, but not so that a copy would explode
        raise RefusedPickleError(f"claims {total} bytes of tensors in a file of {num_bytes}")
    return infos


def _storage_bytes(storage: StorageRecord) -> int:
    return storage.count * BITS[storage.dtype] // 8
