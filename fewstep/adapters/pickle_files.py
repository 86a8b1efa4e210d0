"""Adapters in torch's own format (.pt, .bin, .ckpt, .pth, .pkl), which torch itself reads.

`torch.load(weights_only=True)` builds tensors and plain containers and calls nothing else, so no
file can run code. It can still claim more than it holds: archives that unpack to more than their
size and tensors that repeat their numbers are refused here, before anything is copied. Memory stays
in proportion to the file; a file made for it can still waste time.
"""

import math
import mmap
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fewstep.adapters.header import PICKLE_STARTS
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    import torch

MAX_FILE_BYTES = 8 * 1024**3
"""Adapters have up to 2 GB; a whole file of the older format is held in memory."""
ZIP_START = b"PK\x03\x04"
NESTED = "state_dict"
PLAIN = (str, int, float, type(None))
RESERVED = "__metadata__"
ADVICE = "Weights only load failed"


def load_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The dictionary of tensors that torch.save wrote, flat or under "state_dict"; on the CPU.

    Raises:
        AdapterError: Not such a file, damaged, or torch's restricted reader refuses it.
        MissingExtraError: torch is not installed.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    _check_start(path, start, num_bytes)
    is_zip = start.startswith(ZIP_START)
    try:
        if is_zip:
            _check_archive(path, num_bytes)
        with warnings.catch_warnings():  # of formats that are about to be refused
            warnings.simplefilter("ignore")
            content = _load_zip(path) if is_zip else _load_legacy(path)
        tensors = _flat(path, content)
        _check_sizes(path, tensors, num_bytes)
    except AdapterError:
        raise
    except ImportError as error:
        raise MissingExtraError("torch", "torch") from error
    except Exception as error:  # whatever damaged bytes lead zipfile, pickle and torch to
        raise _refused(
            path, f"torch.load(weights_only=True) refuses it ({_reason(error)})"
        ) from error
    return tensors


def save_private_copy(path: Path, tensors: "dict[str, torch.Tensor]", target: Path) -> None:
    """Write tensors as a safetensors file that only this user can read, whole or not at all.

    Args:
        path: The file they came from, for messages.
        tensors: From `load_tensors`; views and transposed ones are packed.
        target: The new file; its folder is made if needed.

    Raises:
        AdapterError: The copy cannot be written, or safetensors has no such dtype.
    """
    from safetensors.torch import save_file

    partial: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
        os.close(descriptor)
        save_file(_packed(tensors), partial)
        os.chmod(partial, 0o600)
        os.replace(partial, target)
    except Exception as error:  # OSError, and what safetensors says of names and dtypes
        raise AdapterError(
            f"{path}: a safetensors copy cannot be written to {target.parent} ({_reason(error)}); "
            "make room there, or ask for a .safetensors file"
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def _load_zip(path: Path) -> object:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_legacy(path: Path) -> object:
    """Through a map of the file, which gives no more than there is, whatever length is claimed."""
    import torch

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return torch.load(cast(BinaryIO, view), map_location="cpu", weights_only=True)


def _check_start(path: Path, start: bytes, num_bytes: int) -> None:
    if num_bytes == 0:
        raise AdapterError(f"{path}: the file is empty (0 bytes); download or save it again")
    if num_bytes > MAX_FILE_BYTES:
        raise _refused(path, f"has {num_bytes} bytes (limit {MAX_FILE_BYTES}), too many to unpack")
    if not start.startswith(PICKLE_STARTS):
        raise AdapterError(
            f"{path}: is no pickle in spite of its name; rename it if it is a .safetensors file, "
            "else download it again"
        )


def _check_archive(path: Path, num_bytes: int) -> None:
    """torch maps the numbers into memory as they lie in the file, and checks no checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if unpacked > num_bytes or not is_stored:
            raise _refused(
                path,
                f"is a compressed archive of {unpacked} bytes in {num_bytes}, which torch.save "
                "never writes",
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise AdapterError(
            f"{path}: {shown(damaged)} in it does not have its checksum, so it is damaged; "
            "download it again"
        )


def _flat(path: Path, content: object) -> "dict[str, torch.Tensor]":
    import torch

    if isinstance(content, dict) and isinstance(content.get(NESTED), dict):
        for name, value in content.items():
            if name != NESTED and not isinstance(value, PLAIN):
                raise _refused(
                    path,
                    f"has {_named(name)} beside its {NESTED!r}, and which of them counts is "
                    "unknown",
                )
        content = content[NESTED]
    if not isinstance(content, dict) or not content:
        raise _refused(path, "holds no dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or name == RESERVED or not isinstance(value, torch.Tensor):
            raise _refused(
                path, f"holds {_named(name)}, which is not a tensor with a name, among its tensors"
            )
    return dict(content)


def _check_sizes(path: Path, tensors: "dict[str, torch.Tensor]", num_bytes: int) -> None:
    """Every number lies in its tensor's storage, and all of them together in the file."""
    total = 0
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise _refused(path, f"holds {shown(name)}, which is sparse, quantised or the like")
        sizes, strides = tensor.shape, tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        end = (tensor.storage_offset() + last + 1) * tensor.element_size()
        is_inside = end <= tensor.untyped_storage().nbytes() and min(strides, default=0) >= 0
        if tensor.numel() and not is_inside:
            raise _refused(path, f"has fewer numbers than {shown(name)} claims")
        total += math.prod(sizes) * tensor.element_size()
    if total > num_bytes:
        raise _refused(path, f"claims {total} bytes of tensors in a file of {num_bytes}")


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def _packed(tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Contiguous, and none in the memory of another, as safetensors wants them."""
    packed, seen = {}, set()
    for name, tensor in tensors.items():
        values = tensor.detach().resolve_conj().resolve_neg().contiguous()
        place = values.untyped_storage().data_ptr()
        packed[name] = values.clone() if place in seen else values
        seen.add(place)
    return packed


def _named(name: object) -> str:
    return shown(name) if isinstance(name, str | int) else f"a key of type {type(name).__name__}"


def _refused(path: Path, reason: str) -> AdapterError:
    return AdapterError(f"{path}: {reason}; ask for a .safetensors file")


def _reason(error: Exception) -> str:
    """What torch says of the file, without its advice on how to open it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [n for n in lines if not n.startswith(ADVICE) and "weights_only" not in n] or lines
    text = told[0].removeprefix("WeightsUnpickler error: ").partition(". ")[0] if told else ""
    text = "".join(c if c.isprintable() else "?" for c in text.removesuffix("."))
    return text[:160] or type(error).__name__
