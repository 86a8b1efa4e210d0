"""The numpy functions that hosts use, as nodes of a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.fused.graph_array import FUNCTIONS, GraphArray
from fewstep.export.fused.recorder import FREE, Recorder


def _writes(function: Any) -> Callable[[Any], Any]:
    def register(writer: Any) -> Any:
        FUNCTIONS[function] = writer
        return writer

    return register


def as_graph(recorder: Recorder, array: Any) -> GraphArray:
    """A numpy array as a constant of the graph."""
    if isinstance(array, GraphArray):
        return array
    return GraphArray(recorder, recorder.constant(array), array.shape, array.dtype)


@_writes(np.concatenate)
def _concatenate(arrays: Sequence[Any], axis: int = 0) -> GraphArray:
    first = next(array for array in arrays if isinstance(array, GraphArray))
    every = [as_graph(first.recorder, array) for array in arrays]
    axis %= first.ndim
    sizes = [array.shape[axis] for array in every]
    if FREE in sizes:
        raise ExportError("a fused graph cannot join batches; leave out --fused")
    shape = (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :])
    values = [array.value for array in every]
    return first.made("Concat", values, shape, [ir.AttrInt64("axis", axis)])


@_writes(np.pad)
def _pad(array: GraphArray, widths: Any) -> GraphArray:
    before, after = zip(*widths, strict=True)
    told = array.recorder.constant(np.array([*before, *after], np.int64))
    shape = [
        size if size == FREE else size + low + high
        for size, low, high in zip(array.shape, before, after, strict=True)
    ]
    return array.made("Pad", [array.value, told], shape)


@_writes(np.clip)
def _clip(array: GraphArray, low: float, high: float) -> GraphArray:
    return array.clip(low, high)


@_writes(np.round)
def _round(array: GraphArray, decimals: int = 0) -> GraphArray:
    assert decimals == 0
    return array.made("Round", [array.value], array.shape)


@_writes(np.split)
def _split(array: GraphArray, sections: int, axis: int = 0) -> list[GraphArray]:
    width = array.shape[axis] // sections
    return [array.sliced(axis, i * width, (i + 1) * width) for i in range(sections)]
