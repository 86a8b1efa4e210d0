"""Write tensors of mixed precisions and metadata as a safetensors file: whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.adapters.writer import write_atomically
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

HASH_KEY = "modelspec.hash_sha256"


def write_safetensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> None:
    """Write a file; equal input gives equal bytes.

    A `modelspec.hash_sha256` in the metadata is brought up to date.

    Raises:
        AdapterError: A value is not finite, or the file cannot be written.
    """
    # Wide numbers first, so that each starts at a multiple of its size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    data = {name: tensors[name].detach().cpu().contiguous() for name in order}
    for name, values in data.items():
        if not bool(values.float().isfinite().all()):
            raise AdapterError(f"{path}: {name} would hold values that are not finite; not written")
    if HASH_KEY in metadata:
        digest = hashlib.sha256()
        for values in data.values():
            digest.update(_bytes(values))
        metadata = {**metadata, HASH_KEY: f"0x{digest.hexdigest()}"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (_header(data, metadata), *(_bytes(v) for v in data.values())))
    except OSError as error:
        raise AdapterError(
            f"{path}: cannot be written ({error.strerror}); give a folder you can write to"
        ) from error


def _header(data: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> bytes:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
    }
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, values in data.items():
        end = position + values.numel() * values.element_size()
        content[name] = {
            "dtype": names[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # readers map the data in place: keep it aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    return values.reshape(-1).view(torch.uint8).numpy().data
