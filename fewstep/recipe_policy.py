"""The part of a recipe that says how a policy is read and followed (`heads.policy`). No torch."""

from dataclasses import dataclass
from typing import Literal

from fewstep import strict_json
from fewstep.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPolicy:
    """How the velocity inside a step is read from a network that answers with a policy.

    Where a substep begins and ends is told by the policy's own clock u, 0 (clean) to 1 (noise):
    sigma = shift * u / (1 + (shift - 1) * u).

    Attributes:
        kind: "dx": the network gives clean data at times of one segment, read between by straight
            lines. "gm": it gives a mixture of round Gaussians of clean data.
        components: How many times ("dx") or Gaussians ("gm").
        shift: Of the clock.
        substeps: How many substeps the whole clock has; a step takes its share, one at least.
        segment: Length of a "dx" policy's segment on the clock; no step may be longer.
        temperature: A "gm" policy's variances are multiplied with this and its log weights divided
            by it, in each step but the last.
    """

    kind: Literal["dx", "gm"]
    components: int
    shift: float
    substeps: int = 128
    segment: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="sampler.policy")
        least = 2 if self.kind == "dx" else 1
        for name, low in (("components", least), ("substeps", 1)):
            value = getattr(self, name)
            if not low <= value <= 1024:
                raise RecipeError(
                    f"sampler.policy.{name} of kind {self.kind!r} must be {low} to 1024, "
                    f"got {value}"
                )
        if self.shift <= 0.0:
            raise RecipeError(f"sampler.policy.shift must be above 0, got {self.shift:g}")
        if (self.segment is not None) != (self.kind == "dx"):
            verb = "needs" if self.kind == "dx" else "does not take"
            raise RecipeError(f"sampler.policy of kind {self.kind!r} {verb} segment")
        if self.segment is not None and not 0.0 < self.segment <= 1.0:
            raise RecipeError(
                f"sampler.policy.segment must be above 0, up to 1, got {self.segment:g}"
            )
        if not 0.0 < self.temperature <= 1.0:
            raise RecipeError(
                f"sampler.policy.temperature must be above 0, up to 1, got {self.temperature:g}"
            )
        if self.kind == "dx" and self.temperature != 1.0:
            raise RecipeError("sampler.policy of kind 'dx' does not take temperature")
