"""A graph in the making: nodes appended one by one, weights shared by name."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

FREE = -1
"""A dimension that stays free; only the batch does."""


class Recorder:
    """Appends nodes, constants and inputs to one graph.

    Args:
        batch: Symbol of the free dimension.
    """

    def __init__(self, batch: str = "batch_size") -> None:
        self.batch = batch
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.weights: dict[str, ir.Value] = {}
        self.domains: dict[str, int] = {}
        """Version of each further set of operators."""
        self._count = 0

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A new input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=self._shape(shape))
        self.inputs.append(value)
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        """An array as a constant of the graph; equal ones are kept once."""
        key = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{_digest(array)}"
        return self.weight(key, ir.tensor(array, name=key))

    def weight(self, name: str, tensor: Any) -> ir.Value:
        """A tensor under a name; the second call with a name gives the first one's value."""
        if name not in self.weights:
            self.weights[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
        return self.weights[name]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        domain: str = "",
        num_outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Append a node.

        Returns:
            Its outputs, named after their order in the graph.
        """
        self._count += 1
        node = ir.Node(
            domain,
            op_type,
            list(inputs),
            list(attributes),
            num_outputs=num_outputs,
            name=f"n{self._count}",
        )
        for index, output in enumerate(node.outputs):
            output.name = f"v{self._count}" + (f"_{index}" if index else "")
        self.nodes.append(node)
        return node.outputs

    def graph(self, name: str, outputs: Sequence[ir.Value], opset: int) -> ir.Graph:
        """The finished graph."""
        made = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            opset_imports={**self.domains, "": opset},
            name=name,
        )
        for value in self.weights.values():
            if value.uses():
                made.register_initializer(value)
        return made

    def _shape(self, shape: Sequence[int]) -> ir.Shape:
        return ir.Shape([self.batch if size == FREE else size for size in shape])


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
