"""Parts of a recipe that only some pipeline classes can follow: growing samples, size-bound grids.

Knows class names only; read in diffusers 0.42.1.
"""

from fewstep.errors import PipelineError
from fewstep.recipe import FewStepRecipe

GROWING = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
)
"""Classes whose samples may grow from step to step: nothing in them holds the first size."""


def check_recipe_fits(class_name: str, recipe: FewStepRecipe) -> None:
    """Refuse what a class could only do wrongly.

    Args:
        class_name: The stock pipeline class.
        recipe: The recipe in force.

    Raises:
        PipelineError: Samples that grow in a class that packs them, a mu of another rule, or a
            size-bound grid whose first noise would have to be known before the size.
    """
    if any(size != 1.0 for grid in recipe.grids for size in grid.sizes):
        _check_can_grow(class_name)
    shift = recipe.resolution_shift
    if shift is None:
        return
    is_flux2 = class_name.startswith("Flux2")
    if is_flux2 != (shift.rule == "flux2_empirical"):
        other = "'flux2_empirical'" if is_flux2 else "'interpolated'"
        raise PipelineError(
            f"this recipe's resolution_shift has rule {shift.rule!r}, but {class_name} computes mu "
            f"by {other}; use a recipe made for this pipeline"
        )
    if any(grid.sigmas[0] < 1.0 for grid in recipe.grids):
        raise PipelineError(
            f"this recipe's grid begins at sigma {recipe.grids[0].sigmas[0]:g} and depends on the "
            f"image size, but {class_name} draws its first noise before it computes mu; store the "
            "shifted grid of one size, without resolution_shift"
        )


def _check_can_grow(class_name: str) -> None:
    if class_name not in GROWING:
        raise PipelineError(
            f"this recipe's samples grow from step to step, which {class_name} cannot do (its "
            f"latents keep the size they begin with); use {', '.join(GROWING[:-1])} or "
            f"{GROWING[-1]}"
        )
