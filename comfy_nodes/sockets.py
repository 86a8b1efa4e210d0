"""The socket of our own: a recipe on a wire."""

from dataclasses import dataclass

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from fewstep.recipe import FewStepRecipe

RecipeSocket = io.Custom("FEWSTEP_RECIPE")


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe, and what to call it in messages.

    Attributes:
        recipe: How to sample.
        name: The adapter file or preset it is from.
    """

    recipe: FewStepRecipe
    name: str
