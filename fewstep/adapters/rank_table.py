"""Ranks and alphas of a file, grouped: most adapters have one row, a surprise shows as a second."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.adapters.modules import LoraModule

LARGEST_USUAL_SCALE = 64.0
"""Trainers set alpha to a few ranks at most; what is beyond this is rather damage than a choice."""


@dataclass(frozen=True, slots=True)
class RankRow:
    """How many modules share a rank and an alpha.

    Attributes:
        rank: Inner size.
        alpha: None where the file says nothing; readers then take the rank.
        modules: How many.
    """

    rank: int
    alpha: float | None
    modules: int

    @property
    def scale(self) -> float:
        """alpha / rank: what multiplies up @ down."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def to_text(self) -> str:
        """The row in words."""
        alpha = "alpha not stored (read as the rank)"
        if self.alpha is not None:
            alpha = f"alpha {self.alpha:g}"
        return f"{self.rank}, {alpha}, scale {self.scale:g}: {self.modules} modules"


def rank_table(modules: Sequence[LoraModule]) -> tuple[RankRow, ...]:
    """One row per pair of rank and alpha, most modules first."""
    counts = Counter((module.rank, module.alpha) for module in modules)
    return tuple(RankRow(rank, alpha, count) for (rank, alpha), count in counts.most_common())


def scale_problems(table: Sequence[RankRow]) -> list[str]:
    """What looks wrong about the scales alpha / rank; one sentence each."""
    problems = []
    idle = sum(row.modules for row in table if row.scale == 0.0)
    if idle:
        problems.append(f"alpha is 0 in {idle} modules, which therefore change nothing")
    reversed_ = sum(row.modules for row in table if row.scale < 0.0)
    if reversed_:
        problems.append(f"alpha is negative in {reversed_} modules, which turns them around")
    largest = max((row.scale for row in table), default=0.0)
    if largest > LARGEST_USUAL_SCALE:
        problems.append(
            f"alpha / rank is {largest:g} at most, far more than trainers set; "
            "the alpha may be damaged"
        )
    return problems
