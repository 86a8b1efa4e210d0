"""Conditions of several prompts as one batch."""

from collections.abc import Sequence

import numpy as np

from fewstep.runtime.hosts.host import Condition


def joined(parts: Sequence[Condition]) -> Condition:
    """Rows below each other.

    Texts of families that do not pad to one length differ in their second axis; the shorter are
    filled up with zeros, which masks read as "not there".
    """
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(values: list[np.ndarray]) -> np.ndarray:
    lengths = {value.shape[1] for value in values if value.ndim > 1}
    if len(lengths) < 2:
        return np.concatenate(values)
    longest = max(lengths)
    return np.concatenate([_lengthened(value, longest) for value in values])


def _lengthened(value: np.ndarray, length: int) -> np.ndarray:
    widths = [(0, 0)] * value.ndim
    widths[1] = (0, length - value.shape[1])
    return np.pad(value, widths)
