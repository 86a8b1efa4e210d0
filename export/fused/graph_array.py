"""An array that writes down what is done with it: the runtime's own arithmetic becomes a graph.

Hosts and the step function work on numpy arrays. Given these instead, the same code appends ONNX
nodes, so that a fused graph is the runtime's computation and cannot drift from it. Only the batch
is free; every other size is known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.fused.recorder import FREE, Recorder

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""numpy function -> what it appends."""


class GraphArray:
    """A value of the graph, as hosts see an array.

    Args:
        recorder: Of the graph.
        value: The value.
        shape: FREE where it is the batch.
        dtype: Its element type.
    """

    __array_ufunc__ = None  # numpy's own scalars leave the arithmetic to this class

    def __init__(
        self, recorder: Recorder, value: ir.Value, shape: Sequence[int], dtype: Any
    ) -> None:
        self.recorder, self.value = recorder, value
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def __array_function__(
        self, function: Any, types: Any, args: Any, kwargs: Any
    ) -> "GraphArray | list[GraphArray]":
        del types
        if function not in FUNCTIONS:
            name = getattr(function, "__name__", function)
            raise ExportError(
                f"a fused graph has no way to write numpy's {name}; leave out --fused"
            )
        return FUNCTIONS[function](*args, **kwargs)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __add__(self, other: Any) -> "GraphArray":
        return self._binary("Add", self, other)

    def __radd__(self, other: Any) -> "GraphArray":
        return self._binary("Add", other, self)

    def __sub__(self, other: Any) -> "GraphArray":
        return self._binary("Sub", self, other)

    def __rsub__(self, other: Any) -> "GraphArray":
        return self._binary("Sub", other, self)

    def __mul__(self, other: Any) -> "GraphArray":
        return self._binary("Mul", self, other)

    def __rmul__(self, other: Any) -> "GraphArray":
        return self._binary("Mul", other, self)

    def __truediv__(self, other: Any) -> "GraphArray":
        return self._binary("Div", self, other)

    def __neg__(self) -> "GraphArray":
        return self.made("Neg", [self.value], self.shape)

    def __getitem__(self, key: Any) -> "GraphArray":
        keys = key if isinstance(key, tuple) else (key,)
        found = self
        dropped = 0
        for axis, one in enumerate(keys):
            if one is Ellipsis:
                raise ExportError("a fused graph needs every axis named in a slice")
            if isinstance(one, int):
                found = found.sliced(axis - dropped, one, one + 1 or 2**62)
                found = found.squeezed(axis - dropped)
                dropped += 1
            elif (one.start, one.stop) != (None, None):
                found = found.sliced(axis - dropped, one.start or 0, one.stop)
        return found

    def clip(self, low: float, high: float) -> "GraphArray":
        """Between two bounds."""
        bounds = [self._constant(low), self._constant(high)]
        return self.made("Clip", [self.value, *bounds], self.shape)

    def astype(self, dtype: Any, copy: bool = True) -> "GraphArray":
        """In another element type."""
        del copy
        wanted = np.dtype(dtype)
        if wanted == self.dtype:
            return self
        to = ir.AttrInt64("to", int(ir.DataType.from_numpy(wanted)))
        return self.made("Cast", [self.value], self.shape, [to], dtype=wanted)

    def reshape(self, *shape: Any) -> "GraphArray":
        """To another shape; a first dimension of FREE stays the batch."""
        wanted = tuple(shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape)
        if wanted[0] != FREE or wanted.count(FREE) != 1:
            raise ExportError(f"a fused graph cannot reshape to {wanted}; the batch comes first")
        told = self.recorder.constant(np.array(wanted, np.int64))
        return self.made("Reshape", [self.value, told], wanted)

    def transpose(self, *axes: Any) -> "GraphArray":
        """With its axes in another order."""
        order = tuple(axes[0] if len(axes) == 1 and isinstance(axes[0], tuple) else axes)
        shape = [self.shape[axis] for axis in order]
        return self.made("Transpose", [self.value], shape, [ir.AttrInt64s("perm", order)])

    def sliced(self, axis: int, start: int, stop: int | None) -> "GraphArray":
        """A range of one axis."""
        size = self.shape[axis]
        if size == FREE:
            raise ExportError("a fused graph cannot cut the batch")
        begin, end, _ = slice(start, stop).indices(size)
        told = [self.recorder.constant(np.array([n], np.int64)) for n in (begin, end, axis)]
        shape = (*self.shape[:axis], end - begin, *self.shape[axis + 1 :])
        return self.made("Slice", [self.value, *told], shape)

    def squeezed(self, axis: int) -> "GraphArray":
        """Without an axis of size 1."""
        told = self.recorder.constant(np.array([axis], np.int64))
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return self.made("Squeeze", [self.value, told], shape)

    def per_picture(self, row: np.ndarray) -> "GraphArray":
        """A row (1, ...) for every picture of this array's batch."""
        recorder = self.recorder
        (batch,) = recorder.node("Shape", [self.value], [ir.AttrInt64("end", 1)])
        rest = recorder.constant(np.array(row.shape[1:], np.int64))
        (target,) = recorder.node("Concat", [batch, rest], [ir.AttrInt64("axis", 0)])
        (wide,) = recorder.node("Expand", [recorder.constant(row), target])
        return GraphArray(recorder, wide, (FREE, *row.shape[1:]), row.dtype)

    def made(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[int],
        attributes: Sequence[ir.Attr] = (),
        *,
        dtype: Any = None,
    ) -> "GraphArray":
        """The output of one more node."""
        (output,) = self.recorder.node(op_type, inputs, attributes)
        chosen = self.dtype if dtype is None else dtype
        return GraphArray(self.recorder, output, shape, chosen)

    def _constant(self, value: Any) -> ir.Value:
        return self.recorder.constant(np.asarray(value, self.dtype))

    def _binary(self, op_type: str, left: Any, right: Any) -> "GraphArray":
        shapes, values = [], []
        for side in (left, right):
            is_graph = isinstance(side, GraphArray)
            shapes.append(side.shape if is_graph else np.shape(side))
            values.append(side.value if is_graph else self._constant(side))
        return self.made(op_type, values, broadcast_shape(*shapes))


def broadcast_shape(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """numpy's rule, the batch being whatever is not 1."""
    rank = max(len(left), len(right))
    sides = [(1,) * (rank - len(side)) + tuple(side) for side in (left, right)]
    return tuple(b if a == 1 else a for a, b in zip(*sides, strict=True))
