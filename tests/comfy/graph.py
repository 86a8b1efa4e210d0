"""Graphs as ComfyUI's API takes them, written node by node."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph; used as an input it is its first output."""

    id: str

    def out(self, slot: int) -> list[Any]:
        """Another output than the first."""
        return [self.id, slot]


@dataclass(slots=True)
class Graph:
    """A graph under construction.

        graph = Graph()
        model = graph.add("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default")
        graph.capture(graph.add("FewStepSigmas", model=model), "sigmas")
        comfy.run(graph.prompt)

    Attributes:
        prompt: The API format, {id: {"class_type", "inputs"}}.
    """

    prompt: dict[str, Any] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node; inputs are values, nodes (their first output) or `Node.out`."""
        node = Node(str(len(self.prompt) + 1))
        given = {
            name: value.out(0) if isinstance(value, Node) else value
            for name, value in inputs.items()
        }
        self.prompt[node.id] = {"class_type": class_type, "inputs": given}
        return node

    def capture(self, value: Node | list[Any], name: str) -> None:
        """`Comfy.run` returns this value under this name."""
        self.add("FewStepTestCapture", value=value, name=name)
