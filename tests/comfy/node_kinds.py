"""Node classes as the front end sees them: sockets, widgets, and what widgets keep in a file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDGETS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": None}
"""Types that are edited in the node, and what they are where a class names no default."""


DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
"""A list whose choices bring inputs of their own."""


@dataclass(frozen=True, slots=True)
class Socket:
    """An input or output of a node class.

    Attributes:
        type: As on the wire; "COMBO" for lists.
        default: Of a widget.
        is_widget: Edited in the node.
        is_optional: May stay unconnected.
        is_multiline: A text of several lines.
        extra: Values that the front end keeps after a widget's own: "control_after_generate" of a
            seed, the button of an upload.
    """

    name: str
    type: str
    default: Any = None
    is_widget: bool = False
    is_optional: bool = False
    is_multiline: bool = False
    extra: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A node class, as far as workflows need it."""

    inputs: tuple[Socket, ...] = ()
    outputs: tuple[Socket, ...] = ()

    @property
    def widgets(self) -> tuple[Socket, ...]:
        """Inputs that are edited in the node, in the order of a file's `widgets_values`."""
        return tuple(socket for socket in self.inputs if socket.is_widget)

    @property
    def edge(self) -> tuple[Socket, ...]:
        """Inputs on the node's edge, in the order of their slots."""
        return tuple(socket for socket in self.inputs if not socket.is_widget)


ABSENT = object()
"""The value of a widget that a file does not know of, as it is younger."""


def held(kind: Kind, values: Sequence[Any]) -> list[tuple[Socket, Any]]:
    """Widgets and their values in a file.

    Args:
        kind: The class, perhaps of a newer ComfyUI, which adds widgets at the end.
        values: A file's `widgets_values`.

    Raises:
        ValueError: The file has more values than the class has widgets.
    """
    left = list(values)
    found: list[tuple[Socket, Any]] = []
    for socket in kind.widgets:
        found.append((socket, left[0] if left else ABSENT))
        del left[: 1 + len(socket.extra)]
    if left:
        raise ValueError(f"no widgets for {left}")
    return found


def kinds_of(nodes: Mapping[str, Any]) -> dict[str, Kind]:
    """Of node classes by id, as ComfyUI holds them (`Comfy.nodes`)."""
    return {name: kind_of(node) for name, node in nodes.items()}


def kind_of(node: Any) -> Kind:
    """Of one node class, old style or new."""
    given = node.INPUT_TYPES()
    inputs = tuple(
        socket
        for part in ("required", "optional")
        for name, spec in given.get(part, {}).items()
        for socket in _sockets(name, spec, is_optional=part == "optional")
    )
    types = [str(type) for type in node.RETURN_TYPES]
    names = getattr(node, "RETURN_NAMES", None) or types  # old classes may leave it out
    outputs = tuple(Socket(str(n or t), t) for n, t in zip(names, types, strict=True))
    return Kind(inputs, outputs)


def _sockets(name: str, spec: Sequence[Any], *, is_optional: bool) -> Iterator[Socket]:
    """One, none that is hidden, or a list and what its first choice brings ("format.codec")."""
    options = spec[1] if len(spec) > 1 else {}
    if options.get("hidden"):
        return
    if str(spec[0]) != DYNAMIC_COMBO:  # str: "*" calls itself equal to every type
        yield _socket(name, spec, is_optional=is_optional)
        return
    choice = options["options"][0]
    yield Socket(name, "COMBO", default=choice["key"], is_widget=True, is_optional=is_optional)
    for part in ("required", "optional"):
        for inner, inner_spec in choice["inputs"].get(part, {}).items():
            yield from _sockets(f"{name}.{inner}", inner_spec, is_optional=part == "optional")


def _socket(name: str, spec: Sequence[Any], *, is_optional: bool) -> Socket:
    options = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    type = "COMBO" if isinstance(spec[0], list) else str(spec[0])
    is_widget = type in WIDGETS and not options.get("forceInput")
    default = options.get("default", choices[0] if choices else WIDGETS.get(type))
    return Socket(
        name,
        type,
        default=default,
        is_widget=is_widget,
        is_optional=is_optional,
        is_multiline=bool(options.get("multiline")),
        extra=_extra(name, options) if is_widget else (),
    )


def _extra(name: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    if options.get("control_after_generate") or name in ("seed", "noise_seed"):
        return ("fixed",)
    return ("image",) if options.get("image_upload") else ()
