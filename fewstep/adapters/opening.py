"""Open an adapter file of either kind: safetensors, or a pickle that holds nothing but tensors."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from fewstep.adapters.header import PICKLE_SUFFIXES, AdapterHeader, read_header
from fewstep.adapters.pickle_files import read_pickle_file
from fewstep.errors import AdapterError

COPY_BYTES = 1024 * 1024


def open_adapter(path: Path | str) -> AdapterHeader:
    """Read and check the header of an adapter file; no tensor is read, nothing is executed.

    Files named .pt, .bin, .ckpt, .pth or .pkl are pickles, and read where they hold a dictionary of
    plain tensors; everything else must be safetensors.

    Raises:
        AdapterError: Missing, a folder, damaged, or a pickle of another kind.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
        return read_pickle_file(path)
    return read_header(path)


def safetensors_copy(header: AdapterHeader, folder: Path | None = None) -> AdapterHeader:
    """The same adapter as a safetensors file, for hosts that open nothing else.

    A safetensors file is given back as it is. A pickle's tensors are written once, under a name
    made of their content, so that the next call finds them.

    Args:
        header: From `open_adapter`.
        folder: Where copies are kept; None takes fewstep's place in the Hugging Face cache
            (`huggingface_hub.cached_assets_path`).

    Raises:
        AdapterError: The file has changed meanwhile, or the copy cannot be written.
    """
    if header.container == "safetensors":
        return header
    if folder is None:
        from huggingface_hub import cached_assets_path

        folder = cached_assets_path("fewstep", namespace="adapters", subfolder="from_pickle")
    try:
        target = folder / _content_name(header) / f"{header.path.stem}.safetensors"
        if not target.is_file():
            _write_copy(header, target)
    except OSError as error:
        raise AdapterError(
            f"{header.path}: a safetensors copy cannot be written to {folder} "
            f"({error.strerror or error}); make room there or convert the file yourself"
        ) from error
    return read_header(target)


def _content_name(header: AdapterHeader) -> str:
    with header.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _write_copy(header: AdapterHeader, target: Path) -> None:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in header.tensors.items():
        end = position + info.num_bytes
        content[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as copy, header.path.open("rb") as source:
            copy.write(len(text).to_bytes(8, "little") + text)
            for info in header.tensors.values():
                source.seek(info.offset)
                left = info.num_bytes
                while left:
                    data = source.read(min(left, COPY_BYTES))
                    if not data:
                        raise AdapterError(f"{header.path}: shrank while it was read; try again")
                    copy.write(data)
                    left -= len(data)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
