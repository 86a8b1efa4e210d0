"""What the doctor says: findings, and the diagnosis they make together. Plain data, no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fewstep.doctor.consumers import ComfySettings, RuntimeLevel
from fewstep.doctor.seen import SeenRun

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or will go wrong.

    Attributes:
        code: Short name that stays the same between releases: "grid/double-shift".
        severity: "error" gives wrong pictures or a crash, "warning" may or costs for nothing,
            "note" is only worth knowing.
        sentence: What is the case, with the numbers.
        fix: What to do.
        evidence: The numbers, as JSON values.
    """

    code: str
    severity: Severity
    sentence: str
    fix: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything the doctor saw of one pipeline or adapter.

    Attributes:
        subject: What was looked at, in a few words.
        recipe_source: Where the recipe came from; None without one.
        trained: The recipe's grid in use as (timestep, sigma); empty without a recipe.
        as_called: The probe with the pipeline's own scheduler; None if it was not run.
        with_fewstep: The probe under the recipe; None without a recipe.
        findings: The worst first.
        comfyui: The same model in ComfyUI; None without a recipe.
        runtime: The same model's levels for a host without torch; empty without a recipe.
    """

    subject: str
    recipe_source: str | None
    trained: tuple[tuple[float, float], ...]
    as_called: SeenRun | None
    with_fewstep: SeenRun | None
    findings: tuple[Finding, ...]
    comfyui: ComfySettings | None = None
    runtime: tuple[RuntimeLevel, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, in their order."""
        return tuple(finding.code for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        """Whether a finding has severity "error"."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "has_errors": self.has_errors}


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings by severity; those of one severity keep their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
