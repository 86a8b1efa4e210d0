"""A sheet as the API takes graphs, with tiny models: what tests run.

Text encoders have no tiny version, and a checkpoint needs them, so a twin has

    CheckpointLoaderSimple -> UNETLoader, and VAELoader under the id followed by "v"
    CLIPTextEncode         -> FewStepTestConditioning
    CLIPLoader, ...        -> nothing

and every other node and link as it is.
"""

from collections.abc import Mapping
from typing import Any

from tests.comfy.node_kinds import Kind
from tests.comfy.sheet import NOTE, Item, Output, Sheet, is_link
from tests.comfy.sheet_ui import widget_values

CHECKPOINT = "CheckpointLoaderSimple"
CHECKPOINT_VAE = 2
PROMPT = "CLIPTextEncode"
DROPPED = (NOTE, "CLIPLoader", "DualCLIPLoader")


def to_api(sheet: Sheet, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The twin of a sheet."""
    checkpoints = [item.id for item in sheet.items if item.type == CHECKPOINT]
    graph: dict[str, Any] = {}
    for item in sheet.items:
        if item.type in DROPPED:
            continue
        if item.type == CHECKPOINT:
            graph[str(item.id)] = _call("UNETLoader", unet_name=item.tiny["model"])
            graph[f"{item.id}v"] = _call("VAELoader", vae_name=item.tiny["vae"])
        elif item.type == PROMPT:
            graph[str(item.id)] = _call("FewStepTestConditioning", **item.tiny)
        else:
            graph[str(item.id)] = _call(item.type, **_inputs(item, kinds[item.type], checkpoints))
    return graph


def _call(class_type: str, **inputs: Any) -> dict[str, Any]:
    if class_type == "UNETLoader":
        inputs["weight_dtype"] = "default"
    return {"class_type": class_type, "inputs": inputs}


def _inputs(item: Item, kind: Kind, checkpoints: list[int]) -> dict[str, Any]:
    values = {**widget_values(item, kind), **item.links(), **item.tiny}
    return {
        name: _reference(value, checkpoints) if is_link(value) else value
        for name, value in values.items()
    }


def _reference(source: Output, checkpoints: list[int]) -> list[Any]:
    if source.node in checkpoints and source.slot == CHECKPOINT_VAE:
        return [f"{source.node}v", 0]
    return [str(source.node), source.slot]
