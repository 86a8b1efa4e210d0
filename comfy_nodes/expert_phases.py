"""Which phase expert makes a network call: by the step, never by a percent. No ComfyUI, no torch.

A recipe gives each expert an interval of noise. Here that becomes, once per run, a bound between
the last step of one phase and the first of the next, halfway: neither rounding nor a model's shift
can move a step across it.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.recipe import FewStepRecipe

TOLERANCE = 1e-4
"""Relative; far above the rounding of a float32 schedule, far below the distance of two steps."""


@dataclass(frozen=True, slots=True)
class PhaseRun:
    """Neighbouring steps of one expert.

    Attributes:
        phase: Index of the expert.
        first: Index of its first step.
        end: Index after its last step.
    """

    phase: int
    first: int
    end: int


def phases_of_steps(recipe: FewStepRecipe, sigmas: Sequence[float]) -> tuple[int, ...]:
    """The expert of every step.

    Args:
        recipe: With experts.
        sigmas: N + 1 falling sigmas as ComfyUI has them: of a flow model the recipe's own, of
            others noise over signal.
    """
    ends = [_comfy_sigma(recipe, expert.sigma_low) for expert in recipe.experts[:-1]]
    rising = [-end * (1.0 - TOLERANCE) for end in ends]  # bisect wants rising numbers
    return tuple(bisect.bisect_left(rising, -sigma) for sigma in sigmas[:-1])


def phase_bounds(recipe: FewStepRecipe, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Lower bound of every phase but the last; infinite for one that has no step."""
    phases = phases_of_steps(recipe, sigmas)
    bounds = []
    for phase in range(len(recipe.experts) - 1):
        count = sum(chosen <= phase for chosen in phases)
        if count == 0:
            bounds.append(math.inf)
        else:
            following = sigmas[count] if count < len(phases) else 0.0
            bounds.append((sigmas[count - 1] + following) / 2.0)
    return tuple(bounds)


def phase_at(bounds: Sequence[float], sigma: float) -> int:
    """The expert of a call at this sigma."""
    for phase, bound in enumerate(bounds):
        if sigma >= bound:
            return phase
    return len(bounds)


def phase_runs(phases: Sequence[int]) -> tuple[PhaseRun, ...]:
    """Steps grouped by their expert, in order."""
    runs, first = [], 0
    for phase, group in itertools.groupby(phases):
        end = first + len(list(group))
        runs.append(PhaseRun(phase, first, end))
        first = end
    return tuple(runs)


def _comfy_sigma(recipe: FewStepRecipe, sigma: float) -> float:
    if recipe.base.schedule.kind == "flow":
        return sigma
    return sigma / math.sqrt(1.0 - sigma * sigma) if sigma < 1.0 else math.inf
