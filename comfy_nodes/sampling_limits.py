"""Which recipes the Few-Step sampler obeys, asked before anything is loaded. Pure Python."""

from fewstep.comfy_nodes.recipe_limits import beyond_comfyui
from fewstep.errors import RecipeError
from fewstep.recipe import FewStepRecipe


def check_can_sample(recipe: FewStepRecipe) -> None:
    """Refuse a recipe that these nodes would not sample exactly as its model was trained.

    Raises:
        RecipeError: The message says why, and what samples it.
    """
    reason = beyond_comfyui(recipe)
    if reason is not None:
        raise RecipeError(
            f"The Few-Step nodes cannot sample this recipe: {reason}; sample it with fewstep's "
            "FewStepPipeline, or with the software of its authors."
        )
