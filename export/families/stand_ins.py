"""Other computations in place of a stock network's own, only while it is traced or compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def processors(blocks: Sequence[Any], processor: Any) -> Iterator[None]:
    """Attention modules with another processor; the stock one comes back."""
    before = [block.processor for block in blocks]
    try:
        for block in blocks:
            block.processor = processor
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.processor = own


@contextmanager
def standing_in(
    module: Any, function: Callable[..., Any], method: str = "forward"
) -> Iterator[None]:
    """A function in place of one of a module's methods."""
    setattr(module, method, function)
    try:
        yield
    finally:
        delattr(module, method)
