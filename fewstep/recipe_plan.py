"""A recipe's grid as planned steps: the one place that reads every field of it. No torch."""

import dataclasses

from fewstep.noise_schedule import CLEAN, Level, NoiseSchedule
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_grids import Grid
from fewstep.sampling import StepWeights, step_weights
from fewstep.trajectory import PlannedStep, signal_weight


def plan_steps(
    recipe: FewStepRecipe, num_steps: int | None = None, *, mu: float | None = None
) -> tuple[PlannedStep, ...]:
    """The network calls of one image and the steps between them.

    Args:
        recipe: Which model; a "flow_map" takes the same steps, a "policy" the same levels.
        num_steps: Step count; None means the recipe's default.
        mu: Size-dependent shift, for recipes with `resolution_shift`.

    Raises:
        RecipeError: The model was not made for this step count.
    """
    grid = recipe.grid(num_steps, mu=mu)
    levels = recipe.levels(num_steps, mu=mu)
    return tuple(_planned(recipe, grid, levels, index) for index in range(grid.num_steps))


def first_noise_scale(recipe: FewStepRecipe, first: Level) -> float:
    """What standard normal noise is multiplied with to be the first sample."""
    return first.sigma if recipe.sampler.first_noise == "scaled" else 1.0


def _planned(
    recipe: FewStepRecipe, grid: Grid, levels: tuple[Level, ...], index: int
) -> PlannedStep:
    schedule = recipe.base.schedule.build()
    now, following = levels[index], levels[index + 1]
    told = grid.clock[index] if grid.clock else now.timestep
    read = schedule.level(told) if grid.read_at == "clock" else now
    via = _via(recipe, grid, schedule, following, index)
    start = read
    if recipe.sampler.noise_correction and index == 0:  # all of the first sample is noise
        start = Level(now.timestep, 0.0, first_noise_scale(recipe, now))
    plain = step_weights(start, following, via)
    sizes = (*(grid.sizes or (1.0,) * grid.num_steps), 1.0)
    return PlannedStep(
        level=dataclasses.replace(now, timestep=told),
        reading=dataclasses.replace(read, timestep=told),
        following=following,
        weights=_solver_weights(grid, index) or plain,
        plain=plain,
        signal=signal_weight(following, via),
        clip_x0=recipe.sampler.clip_x0,
        size=sizes[index],
        following_size=sizes[index + 1],
        expert=grid.experts[index] if grid.experts else None,
    )


def _via(
    recipe: FewStepRecipe, grid: Grid, schedule: NoiseSchedule, following: Level, index: int
) -> Level:
    if not grid.stops:
        return schedule.via(following, recipe.sampler.stochasticity)
    stop = grid.stops[index]
    return CLEAN if stop == 0.0 else schedule.level(schedule.timestep_of_sigma(stop), stop)


def _solver_weights(grid: Grid, index: int) -> StepWeights | None:
    if not grid.solver:
        return None
    row = grid.solver[index]
    return StepWeights(row.sample, row.x0, 0.0, row.previous_sample, row.previous_x0)
