"""TensorRT's Python module, imported when first used.

It carries no type information, so its objects are `Any` here; the names below say which they are.
(`make tensorrt-surface` and docs/tensorrt.md tell how uses are checked against NVIDIA's wheels.)
"""

import importlib
from typing import Any, TypeAlias

CudaEngine: TypeAlias = Any
Refitter: TypeAlias = Any
Runtime: TypeAlias = Any
LogBase: TypeAlias = Any


def library() -> Any:
    """The module `tensorrt`; `preflight.require_tensorrt` has said what is wrong with it, if so."""
    return importlib.import_module("tensorrt")
