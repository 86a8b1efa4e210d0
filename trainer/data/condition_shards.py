"""Embeddings in several pieces, each of its own length, for more prompts than fit in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.errors import ShapeError
from fewstep.trainer.backbones.condition import Condition


@dataclass(frozen=True, slots=True)
class ConditionShards:
    """Conditions one after the other; rows are gathered when they are asked for.

    Attributes:
        parts: On the CPU, typically memory-mapped; of different lengths only with masks.

    Raises:
        ShapeError: The lengths differ and there is no mask.
    """

    parts: tuple[Condition, ...]

    def __post_init__(self) -> None:
        _check_lengths(self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, index: Tensor) -> Condition:
        """The rows at `index`, shape (B,) of integers; padded to the longest part they touch."""
        index = index.cpu()
        which, within = located(index, [len(part) for part in self.parts])
        touched = which.unique().tolist()
        places = [(which == number).nonzero().flatten() for number in touched]
        taken = [
            self.parts[number].take(within[place])
            for number, place in zip(touched, places, strict=True)
        ]
        return joined(taken).take(torch.cat(places).argsort())


def located(index: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(piece, row within it) of rows counted over all pieces, each of shape (B,).

    Raises:
        IndexError: A row is not there.
    """
    ends = torch.tensor(list(accumulate(sizes)))
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < int(ends[-1]):
        raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {int(ends[-1])}")
    which = torch.bucketize(index, ends, right=True)
    return which, index - torch.cat([ends.new_zeros(1), ends])[which]


def joined(parts: Sequence[Condition]) -> Condition:
    """Several conditions as one; shorter ones are padded with masked tokens.

    Raises:
        ShapeError: The lengths differ and there is no mask.
    """
    _check_lengths(parts)
    longest = max(part.sequence.shape[1] for part in parts)
    pooled = [part.pooled for part in parts if part.pooled is not None]
    masks = [_longer(part.mask, longest) for part in parts if part.mask is not None]
    return Condition(
        torch.cat([_longer(part.sequence, longest) for part in parts]),
        torch.cat(pooled) if pooled else None,
        torch.cat(masks) if masks else None,
    )


def _longer(rows: Tensor, length: int) -> Tensor:
    """Zeros, or false, after the tokens: (B, tokens, ...) to (B, length, ...)."""
    missing = length - rows.shape[1]
    return functional.pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing)) if missing else rows


def _check_lengths(parts: Sequence[Condition]) -> None:
    lengths = sorted({part.sequence.shape[1] for part in parts})
    if len(lengths) > 1 and any(part.mask is None for part in parts):
        raise ShapeError(
            f"prompts gave embeddings of {lengths[0]} and of {lengths[-1]} tokens, and this model "
            "takes no mask to pad them with; set one max_sequence_length for all"
        )
