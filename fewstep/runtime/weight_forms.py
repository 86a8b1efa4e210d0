"""Forms in which an exported graph stores a parameter, told by the end of the initializer's name.

    NAME             as the torch module has it
    NAME::T          transposed
    NAME::UPrc       of a 3x3 convolution behind a doubling of the size by repetition: the 2x2
                     kernel that makes the output pixels of even or odd row r and column c from the
                     small picture (`phase_kernel`)

A LoRA can so be merged into an exported graph, or refitted into an engine, without guessing which
tensor is which.
"""

from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRANSPOSED = "::T"
PHASES = {f"::UP{row}{column}": (row, column) for row in (0, 1) for column in (0, 1)}
"""End of a name -> (row, column), each 0 or 1."""


def parameter_of(stored: str) -> str:
    """The parameter behind an initializer's name."""
    for ending in (TRANSPOSED, *PHASES):
        stored = stored.removesuffix(ending)
    return stored


def is_phase(stored: str) -> bool:
    """Whether an initializer is one of the four kernels of an upsampling convolution."""
    return stored.endswith(tuple(PHASES))


def stored_names(parameter: str, known: Container[str]) -> tuple[str, ...]:
    """The names a graph holds a parameter under; empty where it does not have it."""
    names = (parameter, *(f"{parameter}{ending}" for ending in (TRANSPOSED, *PHASES)))
    return tuple(name for name in names if name in known)


def stored_value(stored: str, value: NDArray[Any]) -> NDArray[Any]:
    """A parameter's value in the form of an initializer's name, contiguous.

    Args:
        stored: The name.
        value: As the torch module has it.
    """
    for ending, (row, column) in PHASES.items():
        if stored.endswith(ending):
            return phase_kernel(value, row, column)
    return np.ascontiguousarray(value.T if stored.endswith(TRANSPOSED) else value)


def phase_kernel(weight: NDArray[Any], row: int, column: int) -> NDArray[Any]:
    """The 2x2 kernel of one phase of "repeat every pixel twice, then convolve with 3x3".

    The taps that fall on copies of the same pixel are added up, in float32:

        row 0:  (w_0, w_1 + w_2) on the pixels (i - 1, i)
        row 1:  (w_0 + w_1, w_2) on the pixels (i, i + 1)

    and columns the same.

    Args:
        weight: Shape (O, C, 3, 3).
        row: 0 for output rows 2i, 1 for 2i + 1.
        column: The same of columns.

    Returns:
        Shape (O, C, 2, 2), contiguous.
    """
    wide = weight.astype(np.float32)
    for axis, phase in ((2, row), (3, column)):
        first, second, third = (np.take(wide, [k], axis=axis) for k in range(3))
        pair = (first, second + third) if phase == 0 else (first + second, third)
        wide = np.concatenate(pair, axis=axis)
    return np.ascontiguousarray(wide.astype(weight.dtype))
