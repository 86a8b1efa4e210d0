"""All that the gate found of a folder, and whether it may be published."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.errors import ExportError
from fewstep.export.checking.drawing import Case
from fewstep.export.checking.limits import HIGHER_IS_BETTER, is_within, shown
from fewstep.export.checking.speed import Times
from fewstep.runtime.cache_folder import write_whole
from fewstep.runtime.manifest import FILE, Manifest, Measured


@dataclass(frozen=True, slots=True)
class Pair:
    """The pictures of one case.

    Attributes:
        case: What was asked for.
        wanted: By the reference, uint8, shape (B, H, W, 3).
        found: By the folder.
        measured: Figures of the worst of them.
    """

    case: Case
    wanted: np.ndarray
    found: np.ndarray
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found.

    Attributes:
        label: The folder, for people.
        reference: What it was held against, for people; None where there was nothing.
        measured: Every figure.
        problems: What forbids publishing beyond the figures that miss their limits.
        doubts: Why a folder that passes is not called verified: its reference proves nothing.
        notes: What a reader may want to know: operators without kernels, large values, sizes.
        pairs: Pictures of each case.
        times: Speed of each artefact.
    """

    label: str
    reference: str | None
    measured: tuple[Measured, ...] = ()
    problems: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    times: tuple[Times, ...] = ()

    @property
    def missed(self) -> tuple[Measured, ...]:
        """Figures that miss their limit, the worst of each kind first."""
        return tuple(m for m in self.measured if not is_within(m))

    @property
    def is_good(self) -> bool:
        """Whether the folder may be published."""
        return not self.missed and not self.problems

    def require(self, *, force: bool = False, can_be_forced: bool = True) -> None:
        """Refuse what may not be published.

        Args:
            force: Whether it is published all the same.
            can_be_forced: Whether the command has such an option.

        Raises:
            ExportError: With the figures in the sentence.
        """
        if self.is_good or force:
            return
        reasons = [*self.problems, *(in_words(m) for m in worst_of_each(self.missed))]
        way = "publish it all the same with --force; " if can_be_forced else ""
        raise ExportError(
            f"{self.label} is refused: {'; '.join(reasons)} ({way}on a busy machine figures of "
            "time are worth little)"
        )

    def entered(self, manifest: Manifest) -> Manifest:
        """The manifest with these figures, and whether all of them hold and prove something."""
        is_verified = self.is_good and not self.doubts
        return dataclasses.replace(manifest, measured=self.measured, verified=is_verified)


def worst_of_each(missed: tuple[Measured, ...]) -> list[Measured]:
    """One figure per thing and unit: the one furthest from its limit."""
    found: dict[tuple[str, str], Measured] = {}
    for one in missed:
        key = (one.what, one.unit)
        if key not in found or _excess(one) > _excess(found[key]):
            found[key] = one
    return list(found.values())


def in_words(measured: Measured) -> str:
    """A figure that misses its limit."""
    value, limit = shown(measured.value), f"{measured.limit:.4g}"
    if measured.unit == "ratio of time":
        return f"{measured.what} takes {value} x the time of what it replaces, at most {limit}"
    if measured.unit == "of 255":
        return f"{measured.what} ({measured.where}) is {value} of 255 away, wanted at most {limit}"
    wanted = "at least" if measured.unit in HIGHER_IS_BETTER else "at most"
    return (
        f"{measured.what} ({measured.where}) has {measured.unit} {value}, wanted {wanted} {limit}"
    )


def write_figures(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json, whole or not at all."""
    write_whole(folder / FILE, manifest.to_json())


def _excess(measured: Measured) -> float:
    assert measured.limit is not None
    gap = measured.value - measured.limit
    return -gap if measured.unit in HIGHER_IS_BETTER else gap
