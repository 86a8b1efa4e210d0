"""Sessions, tokenizers and noise that record: what a host asks for becomes a part of a graph."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.fused.graph_array import GraphArray
from fewstep.export.fused.numpy_functions import as_graph
from fewstep.export.fused.recorder import FREE, Recorder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds

INNER = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class RecordedSession:
    """A component's graph, copied into the fused one at every call; its weights are shared.

    Args:
        recorder: Of the fused graph.
        name: The component, before the names of its weights.
        graph: Its manifest entry.
        file: Its ONNX file.
        twins: Components recorded before that may have some of the same weights: those that are
            equal in name, type and bytes are kept once, under the first twin's name.
    """

    provider = "recorded"

    def __init__(
        self, recorder: Recorder, name: str, graph: Graph, file: Path, twins: Sequence[str] = ()
    ) -> None:
        self.graph = graph
        self._recorder, self._name, self._twins = recorder, name, tuple(twins)
        self._model = ir.load(file)
        recorder.domains.update(self._model.opset_imports)
        self._weights: dict[str, ir.Value] = {}
        self._fixed: dict[ir.Value, ir.Value] = {}

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`; gives GraphArrays."""
        given: dict[str, Any] = {
            name: as_graph(self._recorder, value) for name, value in feeds.items()
        }
        sizes = _sizes(self.graph, given)
        values = self._copied(given, set(outputs or [t.name for t in self.graph.outputs]), sizes)
        found: dict[str, Any] = {}
        for tensor in self.graph.outputs:
            if tensor.name in values:
                shape = [_size(dim, sizes) for dim in tensor.dims]
                found[tensor.name] = GraphArray(
                    self._recorder, values[tensor.name], shape, tensor.dtype
                )
        return found

    def _copied(
        self, given: dict[str, GraphArray], wanted: set[str], sizes: Mapping[str, int]
    ) -> dict[str, ir.Value]:
        """What weights alone decide is copied in the first call, and is the same in the others."""
        graph, fixed = self._model.graph, self._fixed
        for name, value in graph.initializers.items():
            fixed[value] = self._weight(name, value.const_value)
        known = {value: given[str(value.name)].value for value in graph.inputs}
        for node in _needed(graph, wanted):
            if all(output in fixed for output in node.outputs):
                continue
            is_fixed = all(value is None or value in fixed for value in node.inputs)
            copies = self._copy(node, ChainMap(fixed, known), sizes)
            (fixed if is_fixed else known).update(zip(node.outputs, copies, strict=True))
        every = ChainMap(fixed, known)
        return {str(v.name): every[v] for v in graph.outputs if v.name in wanted}

    def _copy(
        self, node: ir.Node, known: Mapping[ir.Value, ir.Value], sizes: Mapping[str, int]
    ) -> Sequence[ir.Value]:
        copies = self._recorder.node(
            node.op_type,
            [None if value is None else known[value] for value in node.inputs],
            list(node.attributes.values()),
            domain=node.domain,
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copies, strict=True):
            new.type = old.type
            if old.shape is not None:  # ranks are read when folding
                new.shape = ir.Shape([self._dim(dim, sizes) for dim in old.shape])
        return copies

    def _dim(self, dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | str | None:
        """A name that means one size in the whole graph: ONNX Runtime shares memory by names.

        Two text encoders both have a "sequence_length", of 77 tokens the one, of 256 the other.
        """
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        size = sizes.get(dim.value)
        if size is None:  # a sum or product of others
            return f"{self._name}.{dim.value}"
        return self._recorder.batch if size == FREE else f"{dim.value}_{size}"

    def _weight(self, name: str, tensor: Any) -> ir.Value:
        if name not in self._weights:
            known = self._recorder.weights
            names = [f"{twin}.{name}" for twin in self._twins]
            same = [n for n in names if n in known and is_same(known[n].const_value, tensor)]
            chosen = same[0] if same else f"{self._name}.{name}"
            self._weights[name] = self._recorder.weight(chosen, tensor)
        return self._weights[name]


def is_same(one: Any, other: Any) -> bool:
    """Whether two tensors are equal in type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tobytes() == other.tobytes()


def _needed(graph: ir.Graph, wanted: set[str]) -> list[ir.Node]:
    """Nodes that the wanted outputs depend on, in order."""
    waiting = [value for value in graph.outputs if value.name in wanted]
    needed: set[ir.Node] = set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in needed:
            continue
        if any(a.type in INNER for a in node.attributes.values()):
            raise ExportError(f"{node.op_type} holds a graph of its own, which cannot be fused")
        needed.add(node)
        waiting += [value for value in node.inputs if value is not None]
    return [node for node in graph if node in needed]


def _sizes(graph: Graph, given: dict[str, GraphArray]) -> dict[str, int]:
    return {
        dim: size
        for tensor in graph.inputs
        for dim, size in zip(tensor.dims, given[tensor.name].shape, strict=True)
        if not dim.isdigit()
    }


def _size(dim: str, sizes: dict[str, int]) -> int:
    if dim.isdigit():
        return int(dim)
    name, *rest = dim.split()
    size = sizes[name]
    if not rest or size == FREE:
        return size
    operator, number = rest
    return size * int(number) if operator == "*" else size // int(number)


class RecordedTokenizer:
    """Token ids are an input of the graph."""

    def __init__(self, recorder: Recorder, name: str, max_length: int | None) -> None:
        self._recorder, self._name, self.max_length = recorder, name, max_length

    def encode(self, prompts: list[str], length: int) -> Any:
        """The input, shape (batch, length)."""
        del prompts
        name = self._name.replace("tokenizer", "input_ids")
        value = self._recorder.input(name, ir.DataType.INT64, (FREE, length))
        return GraphArray(self._recorder, value, (FREE, length), np.int64)

    def encode_with_mask(self, prompts: list[str], length: int, **template: str) -> Any:
        """Refused: what is done to a prompt before it is tokens cannot be in the graph."""
        raise ExportError(
            "this family rewrites prompts and masks their padding before its text encoder, which "
            "a fused graph of token ids cannot do; leave out --fused"
        )

    encode_longest = count = encode_with_mask


class RecordedNoise:
    """Every draw is a slice of one input, shape (batch, draws, C, h, w)."""

    def __init__(self, recorder: Recorder, draws: int, shape: Sequence[int]) -> None:
        whole = (FREE, draws, *shape)
        value = recorder.input("noise", ir.DataType.FLOAT, whole)
        self._noise = GraphArray(recorder, value, whole, np.float32)
        self._next = 0

    def draw(self, shape: Sequence[int]) -> Any:
        """The next draw, shape (batch, C, h, w)."""
        assert tuple(shape) == self._noise.shape[2:]
        drawn = self._noise[:, self._next]
        self._next += 1
        return drawn
