"""Which stage of a two-stage recipe a pipeline samples (LTX: draw small, enlarge, draw again)."""

from dataclasses import replace

from fewstep.errors import PipelineError
from fewstep.recipe_resolution import ResolvedRecipe


def at_stage(resolved: ResolvedRecipe, stage: int) -> ResolvedRecipe:
    """The recipe as one stage sees it.

    The second stage is called with the enlarged latents of the first (`latents=`); its noise is
    added there, up to the first sigma of its grid.

    Args:
        resolved: The whole recipe and where it came from.
        stage: 1 or 2.

    Raises:
        PipelineError: Another number.
        RecipeError: There is no second stage.
    """
    if stage == 1:
        return resolved
    if stage != 2:
        raise PipelineError(f"stage is {stage}; a recipe has stage 1 and at most a stage 2")
    recipe = resolved.recipe.for_second_stage()
    return replace(resolved, recipe=recipe, source=f"{resolved.source} (second stage)")
