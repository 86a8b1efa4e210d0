"""A sheet as the front end saves workflows: every node has a place, every widget a value."""

from collections.abc import Mapping
from typing import Any

from tests.comfy.node_kinds import Kind
from tests.comfy.sheet import NOTE, Group, Item, Sheet

COLUMN_GAP = 60
GROUP_GAP = 60
NODE_GAP = 54
PADDING = 20
TITLE = 30
GROUP_TITLE = 40
WIDTH = 320
TEXT_HEIGHT = 110

OURS = {"color": "#1f4d3a", "bgcolor": "#173a2c"}
"""Of the pack's own nodes, so that they are found at once."""
NOTES = {"color": "#432", "bgcolor": "#221"}


def to_ui(sheet: Sheet, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """A workflow file of the front end (format 0.4).

    Args:
        sheet: Nodes whose classes are all in `kinds`, and notes.
        kinds: `kinds_of` a ComfyUI.

    Raises:
        ValueError: A node is given an input that its class does not have.
    """
    kinds = {NOTE: Kind(), **kinds}
    places, frames = _layout(sheet, kinds)
    links = links_of(sheet, kinds)
    order = _order(sheet)
    nodes = [
        _node(item, kinds[item.type], links) | places[item.id] | {"order": order.index(item.id)}
        for item in sheet.items
    ]
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": frames,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def links_of(sheet: Sheet, kinds: Mapping[str, Kind]) -> list[list[Any]]:
    """Links as [id, from node, slot, to node, slot, type]."""
    types = {item.id: item.type for item in sheet.items}
    links: list[list[Any]] = []
    for item in sheet.items:
        for slot, socket in enumerate(kinds[item.type].edge):
            source = item.links().get(socket.name)
            if source is not None:
                given = kinds[types[source.node]].outputs[source.slot]
                link = [len(links) + 1, source.node, source.slot, item.id, slot, given.type]
                links.append(link)
    return links


def widget_values(item: Item, kind: Kind) -> dict[str, Any]:
    """The value of every widget of a node, given or default, in its class's order.

    Raises:
        ValueError: The node is given an input that its class does not have.
    """
    if unknown := sorted(set(item.inputs) - {socket.name for socket in kind.inputs}):
        raise ValueError(f"{item.type} has no input {unknown}")
    return {socket.name: item.inputs.get(socket.name, socket.default) for socket in kind.widgets}


def _node(item: Item, kind: Kind, links: list[list[Any]]) -> dict[str, Any]:
    inputs = [
        {"name": socket.name, "type": socket.type, "link": _arriving(links, item.id, slot)}
        | ({"shape": 7} if socket.is_optional else {})
        for slot, socket in enumerate(kind.edge)
    ]
    outputs = [
        {"name": socket.name, "type": socket.type, "links": _leaving(links, item.id, slot)}
        for slot, socket in enumerate(kind.outputs)
    ]
    node: dict[str, Any] = {
        "id": item.id,
        "type": item.type,
        "flags": {},
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": _properties(item),
        "widgets_values": _stored(item, kind),
    }
    if item.title:
        node["title"] = item.title
    if item.type == NOTE:
        return node | NOTES
    return node | OURS if "FewStep" in item.type else node


def _arriving(links: list[list[Any]], node: int, slot: int) -> int | None:
    return next((link[0] for link in links if link[3:5] == [node, slot]), None)


def _leaving(links: list[list[Any]], node: int, slot: int) -> list[int]:
    return [link[0] for link in links if link[1:3] == [node, slot]]


def _properties(item: Item) -> dict[str, Any]:
    if item.type == NOTE:
        return {}
    pack = "fewstep-nodes" if "FewStep" in item.type else "comfy-core"
    found: dict[str, Any] = {"Node name for S&R": item.type, "cnr_id": pack}
    if item.files:
        found["models"] = [
            {"name": file.name, "url": file.url, "directory": file.folder} for file in item.files
        ]
    return found


def _stored(item: Item, kind: Kind) -> list[Any]:
    if item.type == NOTE:
        return [item.inputs["text"]]
    values = widget_values(item, kind)
    return [value for socket in kind.widgets for value in (values[socket.name], *socket.extra)]


def _order(sheet: Sheet) -> list[int]:
    """Ids so that every node comes after what it needs."""
    done: list[int] = []
    waiting = list(sheet.items)
    while waiting:
        ready = [item for item in waiting if all(out.node in done for out in item.links().values())]
        if not ready:
            raise ValueError(f"{sheet.name} has a circle of links")
        done += [item.id for item in ready]
        waiting = [item for item in waiting if item not in ready]
    return done


def _height(item: Item, kind: Kind) -> int:
    """As the front end would make it."""
    rows = max(len(kind.edge), len(kind.outputs))
    widgets = sum(1 + len(socket.extra) for socket in kind.widgets)
    texts = sum(TEXT_HEIGHT for socket in kind.widgets if socket.is_multiline)
    return 20 * rows + 24 * widgets + texts + (14 if widgets else 6)


def _layout(
    sheet: Sheet, kinds: Mapping[str, Kind]
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Places of nodes by id, and frames of groups."""
    places: dict[int, dict[str, Any]] = {}
    frames: list[dict[str, Any]] = []
    left = 0
    for column in sheet.columns:
        sizes = [item.size for group in column for item in group.items if item.size]
        width = max([WIDTH, *(size[0] for size in sizes)])
        top = 0
        for group in column:
            bottom = _stack(group, kinds, (left + PADDING, top), width, places)
            box = [left, top, width + 2 * PADDING, bottom - top]
            frames.append(_frame(group, box, len(frames) + 1))
            top = bottom + GROUP_GAP
        left += width + 2 * PADDING + COLUMN_GAP
    return places, frames


def _stack(
    group: Group,
    kinds: Mapping[str, Kind],
    corner: tuple[int, int],
    width: int,
    places: dict[int, dict[str, Any]],
) -> int:
    """Put a group's nodes under one another; returns where the group ends."""
    left, top = corner
    top += GROUP_TITLE + TITLE
    for item in group.items:
        height = item.size[1] if item.size else _height(item, kinds[item.type])
        places[item.id] = {"pos": [left, top], "size": [width, height]}
        top += height + NODE_GAP
    return top - NODE_GAP + PADDING


def _frame(group: Group, box: list[int], number: int) -> dict[str, Any]:
    return {
        "id": number,
        "title": group.title,
        "bounding": box,
        "color": group.colour,
        "font_size": 24,
        "flags": {},
    }
