"""The instructions of a torch pickle, read as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine, and its REDUCE instruction calls any function that
the file names. Here a function's name stays a name: three of them (`_rebuild_tensor_v2`,
`_rebuild_parameter`, `OrderedDict`) are known and become plain records, every other one is an
error. What is understood is a part of what `torch.load(weights_only=True)` understands: enough for
dictionaries of tensors, numbers and text. No instruction walks over what others have built, so the
time is in proportion to the length of the program.

Source: the opcodes and their meaning, CPython's Lib/pickletools.py; what torch writes,
torch/serialization.py and torch/_utils.py.
"""

import pickletools
from typing import Any, Protocol, cast

from fewstep.adapters.pickle_records import (
    FunctionName,
    RefusedPickleError,
    built,
    set_items,
    storage_of,
)

MAX_INSTRUCTIONS = 1_000_000
"""A tensor takes about 30; more is damage or an attack, and would take minutes."""
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


class Stream(Protocol):
    """Where the instructions come from; only these two are used."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


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
                argument = opcode.arg.reader(cast(Any, stream))
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
                set_items(_as_dict(stack[-1]), items)
            case "GLOBAL":
                stack.append(argument)
            case "STACK_GLOBAL":
                module, function = self._pop_last(2)
                if not isinstance(module, str) or not isinstance(function, str):
                    raise TypeError("not a name")
                stack.append(FunctionName(module, function))
            case "BINPERSID":
                stack.append(storage_of(stack.pop()))
            case "REDUCE":
                function, arguments = self._pop_last(2)
                stack.append(built(function, arguments))
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
