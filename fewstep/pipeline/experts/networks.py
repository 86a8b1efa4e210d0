"""Experts with a network each (Wan 2.2): which network serves a step is the pipeline's decision.

diffusers compares the timestep with `boundary_ratio * num_train_timesteps`. Here that number comes
from the recipe, and it is checked that the steps fall to the networks as the recipe counts them.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.attached_adapter import denoiser_of
from fewstep.recipe import Expert, FewStepRecipe, Grid

BOUNDARY = "boundary_ratio"
HIGH, LOW = "transformer", "transformer_2"


def has_own_networks(recipe: FewStepRecipe) -> bool:
    """Whether the recipe's experts have networks of their own."""
    return any(expert.component == LOW for expert in recipe.experts)


def boundary_ratio(recipe: FewStepRecipe) -> float:
    """The boundary as diffusers wants it: the sigma at which the second network takes over.

    Where rounding of timesteps would count a step wrongly, the middle between the last step of the
    one network and the first of the other.

    Raises:
        PipelineError: No boundary divides every grid as the recipe does.
    """
    total = recipe.base.schedule.num_train_timesteps
    second = next(expert for expert in recipe.experts if expert.component == LOW)
    grids = recipe.grids
    if all(_agrees(grid, recipe.experts, second.sigma_high, total) for grid in grids):
        return second.sigma_high
    highs, lows = [float(total)], [0.0]
    for grid in grids:
        for timestep, index in zip(grid.timesteps, grid.experts, strict=True):
            (lows if recipe.experts[index].component == LOW else highs).append(timestep)
    middle = (min(highs) + max(lows)) / 2.0 / total
    if all(_agrees(grid, recipe.experts, middle, total) for grid in grids):
        return middle
    raise PipelineError(
        f"no {BOUNDARY} divides the grids of this recipe between {HIGH} and {LOW} as its experts "
        "do; list the experts of one network together, the noisier network first"
    )


def check_networks(pipe: DiffusionPipeline, recipe: FewStepRecipe) -> None:
    """Whether the recipe's experts and the pipeline's networks belong together.

    Raises:
        PipelineError: One has a second network that the other knows nothing of.
    """
    name = type(pipe).__name__
    if not has_own_networks(recipe):
        splits = pipe.components.get(LOW) is not None and pipe.config.get(BOUNDARY) is not None
        if recipe.experts and splits:
            raise PipelineError(
                f"the experts of this recipe share one network, but {name} here has {HIGH} and "
                f"{LOW}; use the base the adapter was made for"
            )
        return
    if BOUNDARY not in pipe.config:
        raise PipelineError(
            f"an expert of this recipe is for {LOW}, but {name} has no such second network; use "
            "the base the adapter was made for"
        )
    unknown = {expert.component or HIGH for expert in recipe.experts} - {HIGH, LOW}
    if unknown:
        raise PipelineError(
            f"an expert of this recipe is for {min(unknown)!r}; {name} has {HIGH} and {LOW}"
        )
    for expert in recipe.experts:
        denoiser_of(pipe, expert.component or HIGH)
    boundary_ratio(recipe)


def install_boundary(pipe: DiffusionPipeline, recipe: FewStepRecipe) -> float | None:
    """Make the pipeline change networks where the recipe says; gives back its own boundary."""
    before = pipe.config.get(BOUNDARY)
    pipe.register_to_config(**{BOUNDARY: boundary_ratio(recipe)})
    return before


def check_counts(pipe: DiffusionPipeline, recipe: FewStepRecipe, grid: Grid) -> None:
    """Whether the pipeline will give every step of a grid to the network the recipe names.

    Raises:
        PipelineError: The boundary was changed, or rounds the wrong way on this grid.
    """
    total, ratio = recipe.base.schedule.num_train_timesteps, pipe.config.get(BOUNDARY)
    if ratio is None or not _agrees(grid, recipe.experts, ratio, total):
        raise PipelineError(
            f"{BOUNDARY} is {ratio}, which does not divide the {grid.num_steps} steps between "
            f"{HIGH} and {LOW} as the recipe does; set it to {boundary_ratio(recipe):g}"
        )


def _agrees(grid: Grid, experts: Sequence[Expert], ratio: float, total: int) -> bool:
    timesteps = torch.tensor(grid.timesteps)  # float32, as the pipeline compares them
    is_high = (timesteps >= ratio * total).tolist()
    return is_high == [experts[index].component != LOW for index in grid.experts]
