"""float32 to bfloat16 and back, which numpy does not know: rounded to nearest, ties to even."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(array: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded.

    Args:
        array: Any float type; NaN stays NaN.

    Returns:
        Bits of the bfloat16 values, same shape.
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bits, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
