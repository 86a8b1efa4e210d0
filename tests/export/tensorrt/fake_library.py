"""A recording stand-in for `tensorrt`, made of the names in a surface file and of nothing else.

A name that TensorRT does not have is an AttributeError here too. What a method does is written in
`fake_engine.py`; a method without a behaviour there fails the test that calls it.
"""

import enum
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

SURFACES = Path(__file__).parent / "surfaces"
TENSORRT_VERSIONS = ("10.12.0.36", "10.16.1.11", "11.4.0.106")
Behaviour = Callable[..., Any]


@cache
def surface(name: str, version: str) -> dict[str, Any]:
    """Names of one version, as `surface.py` wrote them."""
    return json.loads((SURFACES / f"{name}-{version}.json").read_text(encoding="utf-8"))


class Recorder:
    """Every call, in order.

    Attributes:
        calls: ("Builder.create_network", positional arguments).
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def names(self) -> list[str]:
        """Names of the calls, in order."""
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of one name."""
        return [arguments for called, arguments in self.calls if called == name]


def fake_tensorrt(version: str, behaviours: dict[str, Behaviour], recorder: Recorder) -> ModuleType:
    """A module with the surface's classes.

    Args:
        version: Of the surface file.
        behaviours: "Class.method" or "Class.property" -> function of (self, ...).
        recorder: Told of every call.
    """
    names = surface("tensorrt", version)["classes"]
    used = {name.partition(".")[0] for name in behaviours} - set(names)
    assert not used, f"TensorRT {version} has no {used}"
    module = FakeModule("tensorrt")
    module.__version__ = version
    module.make = lambda name: _class(name, names[name], behaviours, recorder)
    return module


class FakeModule(ModuleType):
    """Makes its classes when they are asked for."""

    __version__: str
    make: Callable[[str], type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "make":
            raise AttributeError(name)
        try:
            made = self.make(name)
        except KeyError:
            raise AttributeError(f"TensorRT {self.__version__} has no {name}") from None
        setattr(self, name, made)
        return made


def _class(
    name: str, shape: dict[str, Any], behaviours: dict[str, Behaviour], recorder: Recorder
) -> type:
    if shape["enum"]:
        made: Any = enum.IntEnum(name, shape["enum"], start=0)
        return made
    body: dict[str, Any] = {}
    for method in shape["methods"]:
        body[method] = _method(f"{name}.{method}", behaviours, recorder)
    for prop in shape["properties"]:
        body[prop] = _property(f"{name}.{prop}", behaviours, recorder)
    for inner, inner_shape in shape["classes"].items():
        body[inner] = _class(inner, inner_shape, behaviours, recorder)
    body["__init__"] = behaviours.get(f"{name}.__init__", lambda self, *arguments: None)
    body["__setattr__"] = _guarded
    body["__module__"] = "tensorrt"
    return type(name, (), body)


def _guarded(self: Any, name: str, value: Any) -> None:
    is_own = type(self).__module__ != "tensorrt"  # a subclass may keep what it likes
    if not (is_own or name.startswith("_") or hasattr(type(self), name)):
        raise AttributeError(f"{type(self).__name__} has no {name}")
    object.__setattr__(self, name, value)


def _method(name: str, behaviours: dict[str, Behaviour], recorder: Recorder) -> Behaviour:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        recorder.calls.append((name, (*arguments, *named.values())))
        if name not in behaviours:
            raise AssertionError(f"{name} was called and the fake does not know what it does")
        return behaviours[name](self, *arguments, **named)

    return call


def _property(name: str, behaviours: dict[str, Behaviour], recorder: Recorder) -> property:
    key = f"_{name.partition('.')[2]}"

    def read(self: Any) -> Any:
        return behaviours[name](self) if name in behaviours else getattr(self, key)

    def write(self: Any, value: Any) -> None:
        recorder.calls.append((f"{name} =", (value,)))
        setattr(self, key, value)

    return property(read, write)
