"""What ComfyUI's own LoRA loader left on a MODEL: newer cores attach the metadata of its file.

The recipe is in there, and so is what that loader does not know and would draw a pale picture:
an alpha beside the tensors, a scale of the recipe, names that it could not place. No ComfyUI.
"""

import json
from collections.abc import Mapping
from typing import Any

from fewstep.adapters.modules import LORA_METADATA_KEY
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY, FewStepRecipe

CORE_METADATA = "lora_metadata"
"""Where newer cores keep a LoRA file's metadata on a MODEL."""


def recipe_of_core(model: Any) -> NamedRecipe | None:
    """The recipe of the file that the core's loader read last, or None.

    Raises:
        RecipeError: The metadata holds a broken one.
        AdapterError: The core's loader cannot have applied the file as it is meant.
    """
    metadata = _as_mapping(model.get_attachment(CORE_METADATA))
    if METADATA_KEY not in metadata:
        return None
    recipe = FewStepRecipe.from_json(str(metadata[METADATA_KEY]))
    title = str(metadata.get("modelspec.title") or "LoRA")
    if (reason := _not_applied(model, recipe, metadata)) is not None:
        raise AdapterError(
            f"ComfyUI's own loader read the few-step adapter '{title}' and {reason}; load it with "
            '"Few-Step LoRA Loader".'
        )
    return NamedRecipe(recipe, title)


def _not_applied(model: Any, recipe: FewStepRecipe, metadata: Mapping[str, Any]) -> str | None:
    if not model.patches:
        return "found no weight of it in MODEL"
    if has_alphas(_as_mapping(metadata.get(LORA_METADATA_KEY))):
        return "does not know the alphas in its metadata, so the weights are too strong or too weak"
    if recipe.lora.scale != 1.0:
        return f"does not know that its recipe scales it by {recipe.lora.scale:g}"
    return None


def has_alphas(config: Mapping[str, Any]) -> bool:
    """Whether a LoraConfig asks for another scale than 1 anywhere (alpha unlike rank)."""
    starts = {key.removesuffix("lora_alpha") for key in config if key.endswith("lora_alpha")}
    return any(
        config[f"{start}lora_alpha"] != config.get(f"{start}r")
        or (config.get(f"{start}alpha_pattern") or {}) != (config.get(f"{start}rank_pattern") or {})
        for start in starts
    )


def _as_mapping(found: object) -> Mapping[str, Any]:
    """Metadata as a mapping; {} for whatever another pack keeps under the same name."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return {}
    return found if isinstance(found, Mapping) else {}
