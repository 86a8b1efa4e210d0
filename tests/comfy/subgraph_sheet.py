"""The subgraph blueprint "few_step_t2i": prompt to picture as one node.

A blueprint is a workflow with a single node, whose type is the id of a subgraph that the workflow
defines. Links from the subgraph's own inputs leave node -10, those to its outputs reach node -20.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from tests.comfy.example_sheets import DMD2, LIGHTHOUSE, TEXT
from tests.comfy.node_kinds import Kind
from tests.comfy.sheet import Sheet
from tests.comfy.sheet_ui import OURS, to_ui

NAME = "few_step_t2i"
SUBGRAPH_ID = str(uuid.uuid5(uuid.NAMESPACE_URL, f"fewstep-nodes/{NAME}"))
INPUT_NODE = -10
OUTPUT_NODE = -20

LINK: tuple[str, ...] = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
"""What a subgraph calls the parts of a link."""

LORA, PROMPT, SIZE, SAMPLER, DECODER = 1, 2, 3, 4, 5
SOCKETS = (("model", LORA), ("clip", PROMPT), ("vae", DECODER))
"""Inputs on the edge, and the node inside that each goes to; there it has the same name."""
WIDGETS = (
    ("text", PROMPT),
    ("lora_name", LORA),
    ("width", SIZE),
    ("height", SIZE),
    ("seed", SAMPLER),
)
"""Inputs that are edited in the one node, and the node inside."""


def inside() -> Sheet:
    """The nodes of the subgraph, not yet connected to its inputs and outputs."""
    sheet = Sheet(NAME)
    sheet.column("Adapter", "load")
    lora = sheet.add("FewStepLoraLoader", size=(380, 220), lora_name=DMD2.name)
    sheet.column("Prompt and size", "prompt")
    prompt = sheet.add("CLIPTextEncode", text=LIGHTHOUSE, size=TEXT)
    size = sheet.add("EmptyLatentImage", width=1024, height=1024)
    sheet.column("Sample", "ours")
    made = sheet.add(
        "FewStepKSampler", model=lora, positive=prompt, latent_image=size, size=(330, 260)
    )
    sheet.add("VAEDecode", samples=made)
    return sheet


def few_step_t2i(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The blueprint's file.

    Args:
        kinds: `kinds_of` a ComfyUI.
    """
    drawn = to_ui(inside(), kinds)
    nodes = {node["id"]: node for node in drawn["nodes"]}
    links: list[dict[str, Any]] = [dict(zip(LINK, link, strict=True)) for link in drawn["links"]]
    inputs = _connect_inputs(nodes, kinds, links)
    output = _connect_output(nodes, links)
    right = max(frame["bounding"][0] + frame["bounding"][2] for frame in drawn["groups"])
    definition = {
        "id": SUBGRAPH_ID,
        "version": 1,
        "state": {
            "lastGroupId": len(drawn["groups"]),
            "lastNodeId": len(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": NAME,
        "inputNode": {"id": INPUT_NODE, "bounding": [-240, 60, 140, 200]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 100, 60, 120, 60]},
        "inputs": inputs,
        "outputs": [output],
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": drawn["groups"],
        "links": links,
        "extra": {},
    }
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"fewstep-nodes/{NAME}/workflow")),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_instance(inputs, nodes, kinds)],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _instance(
    inputs: list[dict[str, Any]], nodes: Mapping[int, dict[str, Any]], kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """The one node of the workflow."""
    values = [_value(nodes[node], kinds, name) for name, node in WIDGETS]
    shown = [name for name, _ in WIDGETS]
    return {
        "id": 1,
        "type": SUBGRAPH_ID,
        "pos": [0, 0],
        "size": [400, 330],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": one["name"], "type": one["type"], "link": None}
            | ({"widget": {"name": one["name"]}} if one["name"] in shown else {})
            for one in inputs
        ],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}],
        "title": NAME,
        "properties": {"proxyWidgets": [["-1", name] for name in shown]},
        "widgets_values": values,
        **OURS,
    }


def _value(node: dict[str, Any], kinds: Mapping[str, Kind], widget: str) -> Any:
    stored: list[str] = []
    for socket in kinds[node["type"]].widgets:
        stored += [socket.name, *map(str, socket.extra)]
    return node["widgets_values"][stored.index(widget)]


def _connect_inputs(
    nodes: Mapping[int, dict[str, Any]], kinds: Mapping[str, Kind], links: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Lead every input of the subgraph to its node; widgets get an edge of their own for it."""
    for name, node in WIDGETS:
        socket = next(s for s in kinds[nodes[node]["type"]].widgets if s.name == name)
        edge = {"name": name, "type": socket.type, "widget": {"name": name}, "link": None}
        nodes[node]["inputs"].append(edge)
    found = []
    for slot, (name, node) in enumerate((*SOCKETS, *WIDGETS)):
        names = [socket["name"] for socket in nodes[node]["inputs"]]
        target = nodes[node]["inputs"][names.index(name)]
        target["link"] = len(links) + 1
        links.append(
            {
                "id": target["link"],
                "origin_id": INPUT_NODE,
                "origin_slot": slot,
                "target_id": node,
                "target_slot": names.index(name),
                "type": target["type"],
            }
        )
        place = [-120, 80 + 20 * slot]
        found.append(_socket(name, target["type"], [target["link"]], place))
    return found


def _connect_output(
    nodes: Mapping[int, dict[str, Any]], links: list[dict[str, Any]]
) -> dict[str, Any]:
    number = len(links) + 1
    links.append(
        {
            "id": number,
            "origin_id": DECODER,
            "origin_slot": 0,
            "target_id": OUTPUT_NODE,
            "target_slot": 0,
            "type": "IMAGE",
        }
    )
    nodes[DECODER]["outputs"][0]["links"].append(number)
    return _socket("IMAGE", "IMAGE", [number], [0, 80])


def _socket(name: str, type: str, links: list[int], place: list[int]) -> dict[str, Any]:
    key = str(uuid.uuid5(uuid.NAMESPACE_URL, f"fewstep-nodes/{NAME}/{name}"))
    return {"id": key, "name": name, "type": type, "linkIds": links, "pos": place}
