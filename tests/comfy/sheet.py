"""A workflow described once, to be written twice: for the front end and for the API.

What people open has places, groups, notes and real models (`sheet_ui.py`); what tests run has the
same nodes and links, with tiny models (`sheet_api.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

NOTE = "MarkdownNote"
"""A node of the front end alone."""

COLOURS = {
    "load": "#3f789e",
    "ours": "#2e7d5b",
    "prompt": "#8a6d3b",
    "result": "#5b4a8a",
    "stock": "#6b6b6b",
    "wrong": "#8c3b3b",
}
"""Colours of groups, by what is in them."""


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a node on a sheet."""

    node: int
    slot: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A node on a sheet; as an input it is its first output."""

    id: int

    def out(self, slot: int) -> Output:
        """Another output than the first."""
        return Output(self.id, slot)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A public file that the front end offers to download.

    Attributes:
        folder: Of ComfyUI's models folder.
        url: Its name is the last part.
    """

    folder: str
    url: str

    @property
    def name(self) -> str:
        """As loaders list it."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What a sheet knows of a node.

    Attributes:
        inputs: Values, and `Output` for links, by input name.
        tiny: Values that its API twin has instead.
        size: Width and height in pixels; None is as the front end would make it.
        files: Of the models it loads.
    """

    id: int
    type: str
    inputs: Mapping[str, Any]
    tiny: Mapping[str, Any]
    title: str | None
    size: tuple[int, int] | None
    files: Sequence[ModelFile]

    def links(self) -> dict[str, Output]:
        """The inputs that are links."""
        return {name: value for name, value in self.inputs.items() if is_link(value)}


def is_link(value: object) -> TypeGuard[Output]:
    """Whether an input is a link and not a value."""
    return isinstance(value, Output)


@dataclass(slots=True)
class Group:
    """Nodes under one another, framed."""

    title: str
    colour: str
    items: list[Item] = field(default_factory=list)


@dataclass(slots=True)
class Sheet:
    """A workflow under construction: columns of groups of nodes, from left to right.

        sheet = Sheet("01_hello")
        sheet.column("1 Load", "load")
        model = sheet.add("UNETLoader", unet_name="sd3.safetensors")

    Attributes:
        name: File name without ending.
        columns: Per column, groups under one another.
        items: All nodes; ids count from 1.
    """

    name: str
    columns: list[list[Group]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def column(self, title: str, colour: str) -> None:
        """Start a column to the right, and a group in it."""
        self.columns.append([])
        self.group(title, colour)

    def group(self, title: str, colour: str) -> None:
        """Start a group under the last one."""
        self.columns[-1].append(Group(title, COLOURS[colour]))

    def note(self, text: str, *, height: int) -> None:
        """Write a note in Markdown."""
        self.add(NOTE, title="About this workflow", size=(400, height), text=text)

    def add(
        self,
        type: str,
        /,
        *,
        title: str | None = None,
        size: tuple[int, int] | None = None,
        tiny: Mapping[str, Any] | None = None,
        files: Sequence[ModelFile] = (),
        **inputs: Any,
    ) -> Placed:
        """Add a node under the last one; inputs are values, nodes or their outputs."""
        item = Item(
            id=len(self.items) + 1,
            type=type,
            inputs={k: v.out(0) if isinstance(v, Placed) else v for k, v in inputs.items()},
            tiny=dict(tiny or {}),
            title=title,
            size=size,
            files=files,
        )
        self.items.append(item)
        self.columns[-1][-1].items.append(item)
        return Placed(item.id)
