"""Fused layers: one native `qkv` is three diffusers modules, and back, exactly.

Separate factors (A_q, B_q), (A_k, B_k), (A_v, B_v) become one pair

    A = [A_q; A_k; A_v]        B = diag(B_q, B_k, B_v)

of the summed rank, whose product is exactly the three products stacked: every other term is a
product with zero. alpha grows with the rank, so that alpha / rank stays. Parts that share one A
(as after a split of a trained fused layer) are stacked without growing: B = [B_q; B_k; B_v].

Which of the two a file has is seen from the zeros; where those cannot tell (B is still zero) the
metadata entry `FUSED_KEY` of files written here does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

FUSED_KEY = "fewstep.fused_ranks"
"""Metadata: JSON of native module -> rank of each part; [] where the parts share one A."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's LoRA.

    Attributes:
        down: (rank, in, ...).
        up: (out, rank, ...).
        alpha: Not yet applied.
        magnitude: DoRA's norms, (out,), or None.
    """

    down: "torch.Tensor"
    up: "torch.Tensor"
    alpha: float
    magnitude: "torch.Tensor | None" = None

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.down.shape[0]

    def swapped(self) -> "Factors":
        """The same with the halves of the output rows changed over."""
        magnitude = None if self.magnitude is None else swapped(self.magnitude)
        return Factors(self.down, swapped(self.up), self.alpha, magnitude)


def swapped(rows: "torch.Tensor") -> "torch.Tensor":
    """(shift, scale) as (scale, shift): halves of the rows change places."""
    import torch

    return torch.cat(rows.chunk(2)[::-1])


def split(
    fused: Factors, rows: Sequence[int], ranks: Sequence[int] | None = None
) -> list[Factors | None]:
    """The factors of each part; None for a part the adapter leaves alone.

    Args:
        fused: Factors of the fused layer.
        rows: Output size of each part.
        ranks: What the metadata says: ranks of the parts, or () for a shared A; None: look.
    """
    ups = fused.up.split(list(rows))
    magnitudes = (
        [None] * len(rows) if fused.magnitude is None else fused.magnitude.split(list(rows))
    )
    ranks = _blocks(fused.up, rows, ranks)
    if not ranks:
        return [
            Factors(fused.down, up.contiguous(), fused.alpha, magnitude)
            for up, magnitude in zip(ups, magnitudes, strict=True)
        ]
    parts: list[Factors | None] = []
    start = 0
    for up, rank, magnitude in zip(ups, ranks, magnitudes, strict=True):
        if rank == 0:
            parts.append(None)
            continue
        block = slice(start, start + rank)
        # The product comes first: it is exact where the quotient is not.
        alpha = fused.alpha * rank / fused.rank
        parts.append(
            Factors(fused.down[block].contiguous(), up[:, block].contiguous(), alpha, magnitude)
        )
        start += rank
    return parts


def merge(parts: Sequence[Factors | None], rows: Sequence[int]) -> tuple[Factors, tuple[int, ...]]:
    """One pair of factors for the fused layer, and the ranks to write down for `split`.

    Raises:
        AdapterError: Only some of the parts are DoRA.
    """
    import torch

    there = [part for part in parts if part is not None]
    magnitudes = [part.magnitude for part in there]
    if any(m is not None for m in magnitudes) and (
        len(there) < len(parts) or any(m is None for m in magnitudes)
    ):
        raise AdapterError(
            "a fused layer is DoRA in only some of its parts, which its own names cannot say; "
            "keep diffusers names"
        )
    magnitude = (
        torch.cat([m for m in magnitudes if m is not None]) if magnitudes[0] is not None else None
    )
    first = there[0]
    if len(there) == len(parts) and all(_shares_down(first, part) for part in there[1:]):
        up = torch.cat([part.up for part in there])
        return Factors(first.down, up, first.alpha, magnitude), ()
    down = torch.cat([part.down for part in there])
    rank = down.shape[0]
    up = first.up.new_zeros((sum(rows), rank, *first.up.shape[2:]))
    top = left = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            up[top : top + height, left : left + part.rank] = _rescaled(part, first)
            left += part.rank
        top += height
    ranks = tuple(0 if part is None else part.rank for part in parts)
    return Factors(down, up, first.alpha * rank / first.rank, magnitude), ranks


def fused_ranks(table: Mapping[str, object], native: str) -> tuple[int, ...] | None:
    """One layer's entry of the metadata table; None where there is none of the right kind."""
    entry = table.get(native)
    if isinstance(entry, list) and all(type(rank) is int and rank >= 0 for rank in entry):
        return tuple(entry)
    return None


def _blocks(up: "torch.Tensor", rows: Sequence[int], said: Sequence[int] | None) -> tuple[int, ...]:
    """Ranks of the diagonal blocks, () for a shared A; what is said is checked."""
    rank = up.shape[1]
    if said == ():
        return ()
    if said is not None and _is_diagonal(up, rows, said):
        return tuple(said)
    count = len(rows)
    if rank % count == 0 and _is_diagonal(up, rows, (rank // count,) * count):
        return (rank // count,) * count
    touched = [bool(part.any()) for part in up.split(list(rows))]
    if sum(touched) == 1:
        return tuple(rank if is_touched else 0 for is_touched in touched)
    return ()


def _is_diagonal(up: "torch.Tensor", rows: Sequence[int], ranks: Sequence[int]) -> bool:
    if len(ranks) != len(rows) or sum(ranks) != up.shape[1]:
        return False
    left = 0
    for part, rank in zip(up.split(list(rows)), ranks, strict=True):
        if part[:, :left].any() or part[:, left + rank :].any():
            return False
        left += rank
    return True


def _shares_down(one: Factors, other: Factors) -> bool:
    import torch

    return (
        one.alpha == other.alpha
        and one.down.shape == other.down.shape
        and torch.equal(one.down, other.down)
    )


def _rescaled(part: Factors, first: Factors) -> "torch.Tensor":
    """The part's up matrix for the first one's alpha / rank; untouched where they agree."""
    scale, wanted = part.alpha * first.rank, first.alpha * part.rank
    return part.up if scale == wanted else part.up * (scale / wanted)
