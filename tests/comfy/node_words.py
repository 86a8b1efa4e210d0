"""What nodes say themselves, as a file of a language has it."""

from collections.abc import Mapping
from typing import Any


def english(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Words of our nodes, in the form of locales/en/nodeDefs.json.

    Args:
        nodes: ComfyUI's classes by id (`Comfy.nodes`).
    """
    ours = (name for name in nodes if "FewStep" in name and "FewStepTest" not in name)
    return {name: said_by(nodes[name]) for name in ours}


def said_by(node: Any) -> dict[str, Any]:
    """Names and tooltips of one node."""
    schema = node.GET_SCHEMA()
    given = node.INPUT_TYPES()
    inputs = {**given.get("required", {}), **given.get("optional", {})}
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in inputs.items()
        },
        "outputs": {
            str(slot): {"name": output.display_name or output.io_type, "tooltip": output.tooltip}
            for slot, output in enumerate(schema.outputs)
        },
    }
