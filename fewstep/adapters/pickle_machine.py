"""The instructions of a torch pickle, read as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine, and its REDUCE instruction calls any function that
the file names. Here a function's name stays a name: three of them (`_rebuild_tensor_v2`,
`_rebuild_parameter`, `OrderedDict`) are known and become plain records, every other one is an
error. What is understood is a part of what `torch.load(weights_only=True)` understands: enough for
dictionaries of tensors, numbers and text.

Source: the opcodes and their meaning, CPython's Lib/pickletools.py; what torch writes,
torch/serialization.py and torch/_utils.py.
"""

import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

MAX_INSTRUCTIONS = 1_000_000
"""A tensor takes about 30; more is damage or an attack, and would take minutes."""
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
_CONSTANTS: dict[str, object] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = {"PROTO", "FRAME"}
_STORING = {"BINPUT", "LONG_BINPUT"}
_FETCHING = {"BINGET", "LONG_BINGET"}
_RARE = {
    *("MARK", "EMPTY_DICT", "EMPTY_LIST", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD", "MEMOIZE", "STOP"),
}
_KNOWN = {*_VALUES, *_CONSTANTS, *_TUPLES, *_SKIPPED, *_STORING, *_FETCHING, *_RARE}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class RefusedPickleError(ValueError):
    """Why a pickle is not read: the second half of a sentence that begins with the file."""


class Stream(Protocol):
    """Where the instructions come from; only these two are used."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


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


class _Mark:
    """Where a list of arguments begins on the stack."""


def read_pickle(stream: Stream) -> object:
    """The object that one pickle describes: dicts, lists, tuples, scalars and `TensorRecord`s.

    Reads up to and including the STOP instruction.

    Raises:
        RefusedPickleError: The bytes are not a pickle, or it asks for more than plain tensors.
    """
    machine = _Machine()
    try:
        for _ in range(MAX_INSTRUCTIONS):
            opcode = _OPCODES[stream.read(1)]
            if opcode.name not in _KNOWN:  # before its argument is read
                raise RefusedPickleError(
                    f"uses the instruction {opcode.name}, which no file of weights needs"
                )
            argument: object = None
            if opcode.name == "GLOBAL":  # pickletools would undo escapes in it, pickle does not
                argument = FunctionName(_line(stream), _line(stream))
            elif opcode.arg is not None:
                argument = opcode.arg.reader(stream)
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            machine.run(opcode.name, argument)
    except RefusedPickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError) as error:
        raise RefusedPickleError("is damaged: its instructions make no sense") from error
    raise RefusedPickleError(f"has more than {MAX_INSTRUCTIONS} instructions")


def is_pickle_start(data: bytes) -> bool:
    """Whether these are the first bytes of a plain pickle of protocol 2 to 5."""
    return len(data) >= 2 and data[0] == 0x80 and 2 <= data[1] <= 5


class _Machine:
    def __init__(self) -> None:
        self.stack: list[object] = []
        self._memo: dict[int, object] = {}

    def run(self, name: str, argument: object) -> None:
        """Obey one instruction."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _STORING:
            assert isinstance(argument, int)
            self._memo[argument] = stack[-1]
        elif name in _FETCHING:
            assert isinstance(argument, int)
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop_last(_TUPLES[name])))
        elif name not in _SKIPPED:
            self._run_rare(name, argument)

    def _run_rare(self, name: str, argument: object) -> None:
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._pop_to_mark()
                _as_list(stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop_last(2) if name == "SETITEM" else self._pop_to_mark()
                _set_items(_as_dict(stack[-1]), items)
            case "GLOBAL":
                stack.append(argument)
            case "STACK_GLOBAL":
                module, function = self._pop_last(2)
                stack.append(FunctionName(str(module), str(function)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                function, arguments = self._pop_last(2)
                stack.append(_built(function, arguments))
            case "BUILD":  # a state dict's `_metadata`: the layers' versions, of no use here
                state = stack.pop()
                if not isinstance(stack[-1], dict) or not isinstance(state, dict):
                    raise RefusedPickleError("sets the state of an object that is not a dictionary")
            case _:  # MEMOIZE
                self._memo[len(self._memo)] = stack[-1]

    def _pop_last(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise IndexError("stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]


def _line(stream: Stream) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError("no end of line")
    return line[:-1].decode("utf-8")


def _as_dict(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise TypeError("not a dict")
    return value


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _set_items(target: dict[object, object], items: list[object]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # tuples could nest and hash for ever
            raise TypeError("a key is neither text nor a number")
        target[key] = value


def _storage(reference: Any) -> StorageRecord:
    """From ("storage", class, key, device, number of elements), and a view in old files."""
    kind, cls, key, device, count, *view = reference
    if kind != "storage" or not isinstance(cls, FunctionName) or any(v is not None for v in view):
        raise ValueError("not a storage")
    if cls.module != "torch" or cls.name not in STORAGES:
        raise RefusedPickleError(f"has a storage of type {_dotted(cls)}")
    if not isinstance(key, str) or not isinstance(device, str) or not _is_size(count):
        raise ValueError("not a storage")
    return StorageRecord(STORAGES[cls.name], key, count)


def _built(function: object, arguments: object) -> object:
    if not isinstance(function, FunctionName) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    if (function.module, function.name) not in _BUILT:
        raise RefusedPickleError(f"asks to call {_dotted(function)}, which tensors do not need")
    if function.name == "OrderedDict":
        return _ordered_dict(arguments)
    if function.name == "_rebuild_parameter":
        if not isinstance(arguments[0], TensorRecord):
            raise TypeError("a parameter without a tensor")
        return arguments[0]
    return _tensor(arguments)


def _ordered_dict(arguments: Sequence[Any]) -> dict[object, object]:
    result: dict[object, object] = {}
    for pair in arguments[0] if arguments else ():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError("not a pair")
        _set_items(result, list(pair))
    return result


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
