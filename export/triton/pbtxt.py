"""Protobuf text: the few forms that config.pbtxt needs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """A name of an enum, written without quotes."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """Fields in order; a sequence becomes a repeated field."""

    fields: tuple[tuple[str, "str | int | bool | Word | Message | Sequence[object]"], ...]


def render(message: Message, indent: str = "") -> str:
    """The text of a message."""
    return "".join(_field(name, value, indent) for name, value in message.fields)


def _field(name: str, value: object, indent: str) -> str:
    if isinstance(value, Message):
        return f"{indent}{name} {{\n{render(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list | tuple):
        if value and all(isinstance(entry, int) for entry in value):
            return f"{indent}{name}: [{', '.join(str(entry) for entry in value)}]\n"
        return "".join(_field(name, entry, indent) for entry in value)
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return value.text
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
