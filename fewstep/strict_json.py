"""Frozen dataclasses from JSON values and back to a JSON Schema, without coercion.

An unknown key, a missing key or a value of another type is an error that names the field.
Understands str, int, float, bool, Literal, X | None, tuple[X, ...], dict[str, X] and nested
dataclasses: what recipes and configs are made of.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Failure = Callable[[str], Exception]
SCALARS = {str: "a string", int: "an integer", float: "a number", bool: "a boolean", Path: "a path"}
SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "string"}


def read(kind: type[T], data: object, *, error: Failure, where: str = "") -> T:
    """Build a dataclass from parsed JSON.

    Args:
        kind: The dataclass.
        data: What `json.loads` gave.
        error: Makes the exception to raise from a message.
        where: Name of the enclosing field, for messages.

    Returns:
        An instance; its own `__post_init__` has run.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where or kind.__name__} must be an object, got {shown(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore
    unknown = sorted(set(data) - set(fields))
    if unknown:
        key = _join(where, shown(unknown[0])[1:-1])  # short, escaped, without its quotes
        raise error(f"unknown key {key}; known keys: {', '.join(fields)}")
    types = get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(types[name], data[name], _join(where, name), error)
        elif _is_required(field):
            raise error(f"{_join(where, name)} is missing; it has no default")
    return kind(**values)


def check(instance: object, *, error: Failure, where: str = "") -> None:
    """Hold a dataclass that was made in Python to the rules that `read` applies to JSON.

    Args:
        instance: The dataclass instance, typically from its `__post_init__`.
        error: Makes the exception to raise from a message.
        where: Name of the enclosing field, for messages.
    """
    types = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):  # pyright: ignore
        name, value = _join(where, field.name), getattr(instance, field.name)
        if _value(types[field.name], value, name, error) != value:
            raise error(f"{name} must hold tuples, and dicts with string keys; got {shown(value)}")


def _value(kind: Any, data: object, where: str, error: Failure) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if data is None and NoneType in inner:
            return None
        (kind,) = (k for k in inner if k is not NoneType)
        return _value(kind, data, where, error)
    if origin is Literal:
        if data not in inner or isinstance(data, bool):
            raise error(f"{where} must be one of {', '.join(map(str, inner))}; got {shown(data)}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise error(f"{where} must be a list, got {shown(data)}")
        return tuple(_value(inner[0], v, f"{where}[{i}]", error) for i, v in enumerate(data))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise error(f"{where} must be an object, got {shown(data)}")
        return {str(k): _value(inner[1], v, f"{where}.{k}", error) for k, v in data.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(data, kind):
            return data  # its own __post_init__ has checked it
        return read(kind, data, error=error, where=where)
    return _scalar(kind, data, where, error)


def _scalar(kind: type, data: object, where: str, error: Failure) -> Any:
    if kind is Path and isinstance(data, str):
        return Path(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            data = float(data)  # JSON does not tell 1 from 1.0
        except OverflowError:
            data = math.inf
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise error(f"{where} must be {SCALARS[kind]}, got {shown(data)}")
    if isinstance(data, float) and not math.isfinite(data):
        raise error(f"{where} must be a finite number, got {data}")
    return data


def schema(kind: Any) -> dict[str, Any]:
    """JSON Schema of a dataclass or field type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        options = [schema(k) for k in inner if k is not NoneType]
        return {"anyOf": [*options, {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is tuple:
        return {"type": "array", "items": schema(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(inner[1])}
    if dataclasses.is_dataclass(kind):
        types = get_type_hints(kind)
        fields = dataclasses.fields(kind)
        return {
            "type": "object",
            "description": (kind.__doc__ or "").partition("\n")[0],
            "additionalProperties": False,
            "properties": {field.name: schema(types[field.name]) for field in fields},
            "required": [field.name for field in fields if _is_required(field)],
        }
    return {"type": SCHEMA_TYPES[kind]}


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def shown(data: object) -> str:
    """A value for a message: its repr, at most 60 characters."""
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
