"""Open an adapter file of either kind: safetensors, or a pickle that holds nothing but tensors."""

import hashlib
from dataclasses import replace
from pathlib import Path

from fewstep.adapters.header import PICKLE_SUFFIXES, AdapterHeader, read_header
from fewstep.adapters.pickle_files import load_tensors, save_private_copy
from fewstep.errors import AdapterError


def open_adapter(path: Path | str, *, cache: Path | None = None) -> AdapterHeader:
    """Read and check the header of an adapter file; nothing in it is executed.

    Of a safetensors file no tensor is read. Files named .pt, .bin, .ckpt, .pth or .pkl are pickles:
    torch's restricted reader opens them, and their tensors are written once into a private
    safetensors copy, named after the file's content, from which everything is read then.

    Args:
        path: The file.
        cache: Where copies are kept; None takes fewstep's place in the Hugging Face cache
            (`huggingface_hub.cached_assets_path`).

    Raises:
        AdapterError: Missing, a folder, damaged, a pickle of anything but tensors, or the copy
            cannot be written.
        MissingExtraError: It is a pickle without a copy yet, and torch is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in PICKLE_SUFFIXES or not path.is_file():
        return read_header(path)
    copy = _copy_of(path, cache)
    try:
        header = read_header(copy)
    except AdapterError as error:
        raise AdapterError(f"{path}: its safetensors copy cannot be used ({error})") from error
    return replace(header, path=path, num_bytes=path.stat().st_size, copy=copy)


def _copy_of(path: Path, cache: Path | None) -> Path:
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    if cache is None:
        from huggingface_hub import cached_assets_path

        cache = cached_assets_path("fewstep", namespace="adapters", subfolder="from_pickle")
    copy = cache / f"{content}.safetensors"
    if not copy.is_file():
        save_private_copy(path, load_tensors(path), copy)
    return copy
