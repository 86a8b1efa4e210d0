"""Prompt embeddings as every family's denoiser takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Condition:
    """Prompt embeddings, one row per sample.

    Attributes:
        sequence: Shape (B, tokens, width).
        pooled: Shape (B, width), or None where the denoiser takes none.
        mask: Shape (B, tokens), true for real tokens, or None where the denoiser takes none.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequence)

    def take(self, index: Tensor) -> "Condition":
        """The rows at `index`, shape (B,) of integers."""
        index = index.to(self.sequence.device)
        return Condition(
            self.sequence[index],
            None if self.pooled is None else self.pooled[index],
            None if self.mask is None else self.mask[index],
        )

    def expand(self, batch_size: int) -> "Condition":
        """One row, repeated."""
        return self.take(torch.zeros(batch_size, dtype=torch.long))

    def beside(self, other: "Condition") -> "Condition":
        """This batch, then the other one; the shorter sequence is padded (masked families only)."""
        return Condition(
            torch.cat(_even(self.sequence, other.sequence)),
            _joined(self.pooled, other.pooled),
            None
            if self.mask is None or other.mask is None
            else torch.cat(_even(self.mask, other.mask)),
        )

    def cast(self, dtype: torch.dtype) -> "Condition":
        """The same in another precision; the mask stays."""
        if self.sequence.dtype == dtype:
            return self
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Condition(self.sequence.to(dtype), pooled, self.mask)

    def to(self, device: torch.device) -> "Condition":
        """The same on another device."""
        return Condition(
            self.sequence.to(device),
            None if self.pooled is None else self.pooled.to(device),
            None if self.mask is None else self.mask.to(device),
        )


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _even(first: Tensor, second: Tensor) -> list[Tensor]:
    longest = max(first.shape[1], second.shape[1])
    padded = []
    for part in (first, second):
        missing = (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])
        padded.append(functional.pad(part, missing) if longest > part.shape[1] else part)
    return padded
