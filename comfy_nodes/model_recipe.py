"""Which recipe a MODEL is sampled with: one order, in one place.

The recipe input > what our loader attached to MODEL > the metadata that newer cores attach when
their own LoRA loader read the file > an error that says what to do.
"""

from typing import Any

from fewstep.comfy_nodes.core_loader import recipe_of_core
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.errors import RecipeNotFoundError

ATTACHMENT = "fewstep"
"""Where our loader keeps the recipe on a MODEL; survives clone() and so every later loader node."""


def attach(model: Any, named: NamedRecipe) -> None:
    """Put a recipe on a MODEL (a clone the caller made)."""
    model.set_attachments(ATTACHMENT, named)


def attached(model: Any) -> NamedRecipe | None:
    """The recipe our loader put on a MODEL, or None."""
    return model.get_attachment(ATTACHMENT)


def resolve(model: Any, given: NamedRecipe | None) -> NamedRecipe:
    """The recipe to sample with.

    Args:
        model: A MODEL.
        given: What is connected to the recipe input, if anything is.

    Raises:
        RecipeNotFoundError: There is none.
        RecipeError: The metadata holds a broken one.
        AdapterError: The core's loader cannot have applied its file as it is meant.
    """
    found = given or attached(model) or recipe_of_core(model)
    if found is None:
        raise RecipeNotFoundError(
            'MODEL carries no few-step recipe. Load the adapter with "Few-Step LoRA Loader", or '
            'connect a "Few-Step Recipe" node (a preset may exist).'
        )
    return found
