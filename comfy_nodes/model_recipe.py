"""Which recipe a MODEL is sampled with: one order, in one place.

The recipe input > what our loader attached to MODEL > the metadata that newer cores attach when
their own LoRA loader read the file > an error that says what to do.
"""

import json
from collections.abc import Mapping
from typing import Any

from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.errors import RecipeNotFoundError
from fewstep.recipe import METADATA_KEY, FewStepRecipe

ATTACHMENT = "fewstep"
"""Where our loader keeps the recipe on a MODEL; survives clone() and so every later loader node."""

CORE_METADATA = "lora_metadata"
"""Where newer cores keep a LoRA file's metadata on a MODEL."""


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
    """
    found = given or attached(model) or _of_core(model.get_attachment(CORE_METADATA))
    if found is None:
        raise RecipeNotFoundError(
            'MODEL carries no few-step recipe. Load the adapter with "Few-Step LoRA Loader", or '
            'connect a "Few-Step Recipe" node (a preset may exist).'
        )
    return found


def _of_core(metadata: object) -> NamedRecipe | None:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:  # another pack's text under the same name
            return None
    if not isinstance(metadata, Mapping) or METADATA_KEY not in metadata:
        return None
    title = metadata.get("modelspec.title")
    return NamedRecipe(FewStepRecipe.from_json(str(metadata[METADATA_KEY])), str(title or "LoRA"))
