"""Whether a pipeline can be sampled by a recipe at all; asked before anything is changed."""

import warnings

from diffusers import ConfigMixin, DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.experts.networks import check_networks
from fewstep.pipeline.families import check_family
from fewstep.pipeline.guidance import call_parameters, rule_of, translate_guidance
from fewstep.pipeline.recipe_fit import check_recipe_fits
from fewstep.recipe import FewStepRecipe

USER = 4
"""Stack depth of whoever called `wrap` or `from_pretrained`, for the warning."""


def check_suitable(pipe: DiffusionPipeline, recipe: FewStepRecipe) -> None:
    """Refuse what could only give wrong pictures; warn where the table had to guess.

    Raises:
        PipelineError: Wrong family, no scheduler, other networks than its experts have, or
            guidance it cannot do.
    """
    stock = type(pipe)
    check_family(stock.__name__, recipe.base.family)
    if pipe.components.get("scheduler") is None:
        raise PipelineError(
            f"{stock.__name__} has no scheduler component that a recipe could replace; "
            "use one of its single-stage pipelines"
        )
    check_networks(pipe, recipe)
    check_recipe_fits(stock.__name__, recipe)
    arguments = translate_guidance(stock, recipe.guidance)
    unet = pipe.components.get("unet")
    if recipe.guidance.mode == "embedded" and isinstance(unet, ConfigMixin):
        if unet.config.get("time_cond_proj_dim") is None:
            raise PipelineError(  # the scale would turn on a second pass instead
                "this recipe feeds the guidance scale to the network, but this UNet has no input "
                "for it (time_cond_proj_dim); use the UNet the recipe was made for"
            )
    if not rule_of(stock.__name__, call_parameters(stock))[1]:
        warnings.warn(
            f"{stock.__name__} is not in fewstep's guidance table; its arguments were guessed from "
            f"its signature: {arguments}",
            stacklevel=USER,
        )
