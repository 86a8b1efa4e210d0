"""Recipes out of widgets: written from nothing, or another one with changes. No ComfyUI here.

Every field of `Changes` has a value that means "as it is", the default of its widget; only the
others change something, so a new widget never changes an old workflow.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast, get_args

from fewstep.comfy_nodes.recipe_limits import FAMILIES, TOLD_GUIDANCE, family_title
from fewstep.comfy_nodes.sigma_lists import NEARLY_CLEAN, parse_numbers
from fewstep.errors import RecipeError
from fewstep.recipe import Base, FewStepRecipe, Grid, Guidance, Sampler, Schedule
from fewstep.recipe_checks import expert_at
from fewstep.sampling import Prediction

FirstNoise = Literal["scaled", "unit"]
AS_IT_IS = "as it is"
"""The choice of a list that changes nothing."""
BETAS: dict[str, tuple[Literal["scaled_linear", "linear"], float, float]] = {
    **dict.fromkeys(("sd15", "sd2", "sdxl"), ("scaled_linear", 0.00085, 0.012)),
    "pixart": ("linear", 0.0001, 0.02),
}
"""Families on a VP schedule -> its betas; all others are flow models."""
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "x0", "flow")
"""What networks of ComfyUI predict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What to change; the defaults change nothing.

    Attributes:
        steps: Step count; 0 keeps it.
        timesteps: The network's timesteps, falling, as text; "" keeps them.
        sigmas: ComfyUI's sigmas, falling, the terminal last, as text; "" keeps them.
        shift: Flow shift of equal steps, in place of the trained ones; 0 keeps those. Steps that
            are written out are taken as they are, beside any shift.
        stochasticity: 0 Euler/DDIM to 1 re-noise; below 0 keeps it.
        guidance: Scale, 1 is off; below 0 keeps it.
        first_noise: "scaled" or "unit" (`recipe_parts.Sampler`); anything else keeps it.
    """

    steps: int = 0
    timesteps: str = ""
    sigmas: str = ""
    shift: float = 0.0
    stochasticity: float = -1.0
    guidance: float = -1.0
    first_noise: str = AS_IT_IS

    @property
    def names(self) -> tuple[str, ...]:
        """What is changed, in the order of the widgets."""
        changed = {
            "steps": self.steps > 0,
            "timesteps": bool(self.timesteps.strip()),
            "sigmas": bool(self.sigmas.strip()),
            "shift": self.shift > 0.0,
            "stochasticity": self.stochasticity >= 0.0,
            "guidance": self.guidance >= 0.0,
            "first_noise": self.first_noise in get_args(FirstNoise),
        }
        return tuple(name for name, is_set in changed.items() if is_set)


def custom_recipe(family: str, prediction: str, changes: Changes) -> FewStepRecipe:
    """A recipe of the user's own.

    Args:
        family: Base family, one of `FAMILIES`.
        prediction: What the network predicts; `AS_IT_IS` is what the family's models do.
        changes: Steps as timesteps, as sigmas, or counted; what is not set gets the plainest
            value: no fresh noise, guidance off.

    Raises:
        RecipeError: No steps are given, or they do not make a recipe.
    """
    if family not in FAMILIES:
        raise RecipeError(f"Base family {family!r} is unknown; use one of {', '.join(FAMILIES)}.")
    base = Base(
        family=family,
        prediction=_prediction(family, prediction),
        schedule=_schedule(family, prediction, changes.shift),
    )
    grid = _written_grid(base, changes)
    if grid is None:
        grid = _equal_steps(base, changes)
    is_flow = base.schedule.kind == "flow"
    is_told = family in TOLD_GUIDANCE and changes.guidance >= 0.0
    plain = FewStepRecipe(
        base=base,
        grids=(grid,),
        default_steps=grid.num_steps,
        sampler=Sampler(first_noise="scaled" if is_flow else "unit"),
        guidance=Guidance(mode="embedded") if is_told else Guidance(),
    )
    return _with_sampling(plain, changes)


def changed_recipe(recipe: FewStepRecipe, changes: Changes) -> FewStepRecipe:
    """A recipe with what is set changed, and everything else as it was.

    Raises:
        RecipeError: The step count is not one it was made for, or the changes contradict it.
    """
    grid = _written_grid(recipe.base, changes)
    if grid is not None:
        recipe = _with_grids(recipe, (grid,), _schedule_of(recipe, changes))
    elif changes.shift > 0.0:
        recipe = _shifted(recipe, changes)
    elif changes.steps > 0:
        recipe = _with_count(recipe, changes.steps)
    return _with_sampling(recipe, changes)


def _prediction(family: str, prediction: str) -> Prediction:
    if prediction not in PREDICTIONS:
        return "epsilon" if family in BETAS else "flow"
    return cast(Prediction, prediction)


def _schedule(family: str, prediction: str, shift: float) -> Schedule:
    if prediction == "flow" or family not in BETAS:
        return Schedule(kind="flow", shift=shift if shift > 0.0 else 1.0)
    if shift > 0.0:
        raise _no_flow(family, shift)
    kind, start, end = BETAS[family]
    return Schedule(kind="vp", beta_schedule=kind, beta_start=start, beta_end=end)


def _no_flow(family: str, shift: float) -> RecipeError:
    return RecipeError(
        f"shift={shift:g}, but {family_title(family)} is no flow model; set shift to 0."
    )


def _written_grid(base: Base, changes: Changes) -> Grid | None:
    """The steps that are written out, taken as they are; None where none are."""
    names = changes.names
    if "timesteps" in names and "sigmas" in names:
        raise RecipeError("Timesteps and sigmas are both written; clear one of them.")
    if "timesteps" in names:
        grid = _grid_of_timesteps(base, parse_numbers(changes.timesteps))
    elif "sigmas" in names:
        grid = _grid_of_sigmas(base, parse_numbers(changes.sigmas))
    else:
        return None
    if changes.steps not in (0, grid.num_steps):
        raise RecipeError(
            f"steps={changes.steps}, but {grid.num_steps} steps are written out; set steps to 0."
        )
    return grid


def _grid_of_timesteps(base: Base, timesteps: tuple[float, ...]) -> Grid:
    _check_falls(timesteps, "Timesteps")
    if base.schedule.kind == "flow" and timesteps[-1] == 0.0:
        raise RecipeError("Timestep 0 of a flow model is clean data, not a step; remove it.")
    schedule = base.schedule.build()
    sigmas = tuple(schedule.sigma_of_timestep(timestep) for timestep in timesteps)
    return Grid(timesteps=timesteps, sigmas=(*sigmas, 0.0))


def _grid_of_sigmas(base: Base, sigmas: tuple[float, ...]) -> Grid:
    """From ComfyUI's numbers, which are noise over signal for VP models."""
    _check_falls(sigmas, "Sigmas")
    if len(sigmas) == 1:
        raise RecipeError("One sigma is no step; write at least two, the last being 0.")
    if sigmas[-1] >= NEARLY_CLEAN:
        raise RecipeError(f"The list ends at {sigmas[-1]:g}; add 0.")
    if base.schedule.kind == "vp":
        sigmas = tuple(sigma / math.sqrt(1.0 + sigma * sigma) for sigma in sigmas)
    schedule = base.schedule.build()
    timesteps = tuple(schedule.timestep_of_sigma(sigma) for sigma in sigmas[:-1])
    return Grid(timesteps=timesteps, sigmas=sigmas)


def _check_falls(values: tuple[float, ...], what: str) -> None:
    for entry, (now, following) in enumerate(pairwise(values), start=2):
        if not now > following:
            raise RecipeError(
                f"{what} must fall: {now:g} is followed by {following:g} (entry {entry})."
            )


def _equal_steps(base: Base, changes: Changes) -> Grid:
    """As many equal steps as are asked for, shifted once."""
    if changes.steps < 1:
        raise RecipeError(
            'A custom recipe needs its steps: write timesteps such as "999, 749, 499, 249", or '
            "sigmas, or set steps."
        )
    if base.schedule.kind == "flow" and changes.shift <= 0.0:
        raise RecipeError(
            f"Equal steps of a flow model ({family_title(base.family)}) need its shift; set shift, "
            "or write the timesteps."
        )
    return _grid_of_timesteps(base, base.schedule.build().uniform_timesteps(changes.steps))


def _schedule_of(recipe: FewStepRecipe, changes: Changes) -> Schedule:
    if changes.shift <= 0.0:
        return recipe.base.schedule
    if recipe.base.schedule.kind != "flow":
        raise _no_flow(recipe.base.family, changes.shift)
    return replace(recipe.base.schedule, shift=changes.shift)


def _shifted(recipe: FewStepRecipe, changes: Changes) -> FewStepRecipe:
    """Equal steps at another shift, in place of the trained ones."""
    schedule = _schedule_of(recipe, changes)
    base = replace(recipe.base, schedule=schedule)
    counts = [grid.num_steps for grid in recipe.grids]
    if changes.steps > 0:
        counts = [changes.steps]
    grids = tuple(_equal_steps(base, replace(changes, steps=count)) for count in counts)
    return _with_grids(recipe, grids, schedule)


def _with_count(recipe: FewStepRecipe, steps: int) -> FewStepRecipe:
    counts = [grid.num_steps for grid in recipe.grids]
    if recipe.steps == "strict" and steps not in counts:
        exactly = f"exactly {counts[0]}" if len(counts) == 1 else "a few counts only"
        raise RecipeError(
            f"steps={steps}, but this adapter was trained for {exactly}. "
            f"Allowed: {', '.join(map(str, counts))}."
        )
    return replace(recipe, default_steps=steps)


def _with_grids(
    recipe: FewStepRecipe, grids: tuple[Grid, ...], schedule: Schedule
) -> FewStepRecipe:
    """Final steps: nothing that was made for the old ones stays."""
    if recipe.experts:
        experts = recipe.experts
        grids = tuple(
            replace(grid, experts=tuple(expert_at(experts, s) for s in grid.sigmas[:-1]))
            for grid in grids
        )
    counts = [grid.num_steps for grid in grids]
    default = recipe.default_steps if recipe.default_steps in counts else counts[-1]
    return replace(
        recipe,
        base=replace(recipe.base, schedule=schedule),
        grids=grids,
        steps="strict",
        default_steps=default,
        resolution_shift=None,
    )


def _with_sampling(recipe: FewStepRecipe, changes: Changes) -> FewStepRecipe:
    sampler = recipe.sampler
    if changes.stochasticity >= 0.0:
        sampler = replace(sampler, stochasticity=changes.stochasticity)
    if changes.first_noise in get_args(FirstNoise):
        sampler = replace(sampler, first_noise=cast(FirstNoise, changes.first_noise))
    guidance = recipe.guidance
    if changes.guidance >= 0.0:
        guidance = _scaled(guidance, changes.guidance)
    return replace(recipe, sampler=sampler, guidance=guidance)


def _scaled(guidance: Guidance, scale: float) -> Guidance:
    """Another scale; told to the network where the old one was, else by a second network call."""
    if guidance.mode in ("embedded", "true_cfg"):
        return replace(guidance, scale=scale)
    return (
        Guidance() if scale == 1.0 else Guidance(mode="cfg", scale=scale, negative_prompt="works")
    )
