"""One line of a report on digits: a sampler and its figures. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sampler's figures. The columns after `nfe` are those of `judge.Scores`.

    Attributes:
        name: "teacher", "student", or "real" for real pictures judged by other real ones.
        steps: Sampling steps; 0 for real pictures.
        nfe: Network evaluations per image, guidance counted double.
        seconds_per_image: Median wall time over batches; 0 for real pictures.
        num_images: Pictures judged; a Frechet distance falls with it (`DigitsJudge.floor`).
        guidance_scale: w applied while sampling; 1 = off, as for students that have it built in.
        sampler: How a step is made: "euler", "ddim", "renoise", "gamma 0.3"; "none" for real.
        seed: The evaluation's seed.
    """

    name: Literal["teacher", "student", "real"]
    steps: int
    nfe: int
    frechet: float
    accuracy: float
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float
    seconds_per_image: float
    num_images: int
    guidance_scale: float
    sampler: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Row":
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A column is missing, unknown or of a wrong type.
        """
        return strict_json.read(Row, data, error=ConfigError)
