"""What the instructions of a torch pickle amount to: names, storages and tensors, as plain records.

Three functions are known (`_rebuild_tensor_v2`, `_rebuild_parameter`, `OrderedDict`); what they
would build is described here, and none of them is called.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's name of a storage class -> safetensors' name of its dtype."""
_BUILT = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}


class RefusedPickleError(ValueError):
    """Why a pickle is not read: the second half of a sentence that begins with the file."""


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A global that the pickle mentions; it is never looked up."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A block of numbers kept outside the pickle.

    Attributes:
        dtype: safetensors' name.
        key: Which block.
        count: Its length in elements, as the pickle claims.
    """

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A window on a storage, row by row without gaps.

    Attributes:
        storage: The block it lies in.
        start: First element.
        shape: Sizes; () for a scalar.
    """

    storage: StorageRecord
    start: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def storage_of(reference: Any) -> StorageRecord:
    """From ("storage", class, key, device, number of elements), and a view in old files."""
    if not isinstance(reference, tuple) or not 5 <= len(reference) <= 6:
        raise TypeError("not a storage")
    kind, cls, key, device, count, *view = reference
    if kind != "storage" or not isinstance(cls, FunctionName) or any(v is not None for v in view):
        raise ValueError("not a storage")
    if cls.module != "torch" or cls.name not in STORAGES:
        raise RefusedPickleError(f"has a storage of type {_dotted(cls)}")
    if not isinstance(key, str) or not isinstance(device, str) or not _is_size(count):
        raise ValueError("not a storage")
    return StorageRecord(STORAGES[cls.name], key, count)


def built(function: object, arguments: object) -> object:
    """What a call would give, as a record; the call is not made."""
    if not isinstance(function, FunctionName) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    if (function.module, function.name) not in _BUILT:
        raise RefusedPickleError(f"asks to call {_dotted(function)}, which tensors do not need")
    if function.name == "OrderedDict":
        if arguments:  # torch fills it afterwards
            raise TypeError("a dictionary made of something")
        return {}
    if function.name == "_rebuild_parameter":
        if not isinstance(arguments[0], TensorRecord):
            raise TypeError("a parameter without a tensor")
        return arguments[0]
    return _tensor(arguments)


def _tensor(arguments: Sequence[Any]) -> TensorRecord:
    storage, start, shape, stride = arguments[:4]
    if not isinstance(storage, StorageRecord) or not _is_size(start):
        raise TypeError("not a tensor")
    if not _are_sizes(shape) or not _are_sizes(stride) or len(shape) != len(stride):
        raise TypeError("not a shape")
    tensor = TensorRecord(storage, start, shape)
    if tensor.count and start + tensor.count > storage.count:
        raise RefusedPickleError(
            f"has a tensor of {tensor.count} numbers in a storage of {storage.count}"
        )
    step = 1
    for size, jump in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and tensor.count and jump != step:
            raise RefusedPickleError(
                f"has a tensor of shape {list(shape)} with gaps or transposed (strides "
                f"{list(stride)})"
            )
        step *= size
    return tensor


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= 16 and all(map(_is_size, value))


def _dotted(function: FunctionName) -> str:
    text = ascii(f"{function.module}.{function.name}")
    return text if len(text) <= 100 else f"{text[:97]}..."


def set_items(target: dict[object, object], items: Sequence[object]) -> None:
    """Put keys and values, in turns, into a dictionary."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # tuples could nest and hash for ever
            raise TypeError("a key is neither text nor a number")
        target[key] = value
