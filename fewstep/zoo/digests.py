"""Digests by which a weights file is known, whatever it is called. No torch."""

import hashlib
from pathlib import Path

from fewstep.adapters.header import AdapterHeader
from fewstep.errors import AdapterError

HEAD_BYTES = 64 * 1024
CHUNK_BYTES = 1 << 20


def fingerprint(header: AdapterHeader) -> str:
    """sha256 over the sorted (tensor name, shape) lines; the same in every dtype."""
    digest = hashlib.sha256()
    for name in sorted(header.tensors):
        shape = ",".join(map(str, header.tensors[name].shape))
        digest.update(f"{name}\t{shape}\n".encode())
    return digest.hexdigest()


def head_digest(header: AdapterHeader) -> str:
    """sha256 over the first 64 KiB of tensor bytes; differs between dtypes.

    Raises:
        AdapterError: The file cannot be read.
    """
    start = min((info.offset for info in header.tensors.values()), default=0)
    try:
        with header.tensor_file.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    except OSError as error:
        raise AdapterError(f"{header.path}: cannot be read ({error.strerror})") from error


def file_sha256(path: Path) -> str:
    """sha256 of a whole file.

    Raises:
        AdapterError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
