"""The grid a model was trained on, as the checks compare it. No torch."""

from collections.abc import Sequence

from fewstep.doctor.subject import Subject
from fewstep.recipe import FewStepRecipe

NEAR = 1.5
"""Timesteps this near (of 1000) are one: stock tables hold integers."""


def trained_timesteps(subject: Subject) -> tuple[float, ...]:
    """The recipe's timesteps as schedulers count them; () without a recipe."""
    grid, recipe = subject.grid, subject.recipe
    if grid is None or recipe is None:
        return ()
    return _unshifted(recipe, subject) or grid.timesteps


def are_near(a: Sequence[float], b: Sequence[float], total: float) -> bool:
    """Whether two grids are the same but for rounding."""
    allowed = NEAR * total / 1000.0
    return len(a) == len(b) and all(abs(x - y) <= allowed for x, y in zip(a, b, strict=True))


def _unshifted(recipe: FewStepRecipe, subject: Subject) -> tuple[float, ...]:
    """Grids of size-dependent recipes are stored before the shift; what ours saw is the truth."""
    ours = subject.with_fewstep
    if recipe.resolution_shift is None or ours is None:
        return ()
    return ours.timesteps


def shown_grid(timesteps: Sequence[float]) -> str:
    """For sentences: "[999, 749, 499, 249]"."""
    return "[" + ", ".join(f"{t:.5g}" for t in timesteps) + "]"
