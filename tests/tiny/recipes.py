"""Recipes of tiny models: four steps on Stable Diffusion's betas or on a flow schedule."""

from dataclasses import replace
from typing import Any

from fewstep.recipe import Base, FewStepRecipe, Grid, Sampler, Schedule

VP_GRID = (999.0, 749.0, 499.0, 249.0)
FLOW_GRID = (1000.0, 937.5, 2500.0 / 3.0, 625.0)
SD_SCHEDULE = Schedule(kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW_SCHEDULE = Schedule(kind="flow", shift=5.0)


def vp_recipe(
    family: str,
    *,
    timesteps: tuple[float, ...] = VP_GRID,
    stochasticity: float = 0.0,
    steps: Any = "strict",
    **changes: Any,
) -> FewStepRecipe:
    """An epsilon recipe on Stable Diffusion's betas."""
    schedule = SD_SCHEDULE.build()
    sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
    recipe = FewStepRecipe(
        base=Base(family=family, prediction="epsilon", schedule=SD_SCHEDULE),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=len(timesteps),
        steps=steps,
        sampler=Sampler(stochasticity=stochasticity),
    )
    return replace(recipe, **changes)


def flow_recipe(
    family: str,
    timesteps: tuple[float, ...] = FLOW_GRID,
    *,
    stochasticity: float = 0.0,
    prediction: Any = "flow",
    schedule: Schedule = FLOW_SCHEDULE,
    **changes: Any,
) -> FewStepRecipe:
    """A recipe on a flow schedule (or another one that is passed), shifted by 5."""
    levels = schedule.build()
    sigmas = (*(levels.sigma_of_timestep(t) for t in timesteps), 0.0)
    recipe = FewStepRecipe(
        base=Base(family=family, prediction=prediction, schedule=schedule),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=len(timesteps),
        sampler=Sampler(stochasticity=stochasticity),
    )
    return replace(recipe, **changes)
