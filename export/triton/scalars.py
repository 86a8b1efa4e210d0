"""Scalar inputs as tensors of one value: Triton carries no scalars to models without batch axis."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

INNER = "_scalar"


def lift_scalars(model: ModelProto, names: set[str]) -> None:
    """Give inputs the shape (1,) and squeeze them inside, in place.

    Args:
        model: Its weights need not be loaded.
        names: Inputs without axes.
    """
    graph = model.graph
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name in names:
                node.input[at] = f"{name}{INNER}"
    axes = f"axes{INNER}"
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axes))
    for value in graph.input:
        if value.name in names:
            value.type.tensor_type.shape.dim.add().dim_value = 1
            inner = f"{value.name}{INNER}"
            squeeze = helper.make_node("Squeeze", [value.name, axes], [inner], name=inner)
            graph.node.insert(0, squeeze)


def copy_with_lifted_scalars(source: Path, target: Path, names: set[str]) -> None:
    """Write the changed graph; external data stays where it is said to lie, beside it."""
    model = onnx.load(str(source), load_external_data=False)
    lift_scalars(model, names)
    target.write_bytes(model.SerializeToString())
