"""Which exports ComfyUI can sample, and how its names and units read as the graphs'. No ComfyUI."""

from dataclasses import dataclass, replace

from fewstep.comfy_nodes.recipe_limits import TOLD_GUIDANCE, beyond_comfyui
from fewstep.errors import RuntimeSettingError
from fewstep.recipe import FewStepRecipe, Guidance, Lora


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How ComfyUI calls networks of one family.

    Attributes:
        title: For people.
        tokens: Names ComfyUI's nodes know its token lists by, one per text encoder.
        pooled: Graph input that takes what ComfyUI keeps as "pooled_output"; None has none.
        timestep_scale: ComfyUI's timestep times this is the schedule's, 0 to 1000.
        predictions: Those ComfyUI has a sampling for.
    """

    title: str
    tokens: tuple[str, ...]
    pooled: str | None = None
    timestep_scale: float = 1.0
    predictions: tuple[str, ...] = ("epsilon", "v")


SERVED = {
    "sd15": Family(title="SD 1.x and 2.x", tokens=("l",)),
    "sdxl": Family(title="SDXL", tokens=("l", "g"), pooled="text_embeds"),
    "sd3": Family(
        title="SD3",
        tokens=("l", "g", "t5xxl"),
        pooled="pooled_projections",
        predictions=("flow",),
    ),
    "flux": Family(
        title="FLUX.1",
        tokens=("l", "t5xxl"),
        pooled="pooled_projections",
        timestep_scale=1000.0,
        predictions=("flow",),
    ),
    "pixart": Family(title="PixArt", tokens=("t5xxl",)),
}
"""By the family's name in recipes and manifests."""


def served(family: str, recipe: FewStepRecipe, name: str) -> Family:
    """The family of an export.

    Args:
        family: As its manifest says.
        recipe: How it is sampled.
        name: Of the export, for messages.

    Raises:
        RuntimeSettingError: ComfyUI cannot sample it; the message lists what can be.
    """
    found = SERVED.get(family)
    if found is None:
        known = ", ".join(f"{one.title} ({key})" for key, one in SERVED.items())
        raise RuntimeSettingError(
            f"'{name}' holds a {family} model, and this node runs {known}; draw it with "
            '`fewstep draw`, or use the model\'s adapter with "Few-Step LoRA Loader".'
        )
    if recipe.base.prediction not in found.predictions:
        raise RuntimeSettingError(
            f"'{name}' predicts {recipe.base.prediction}, and for {found.title} this node runs "
            f"{' and '.join(found.predictions)}; draw it with `fewstep draw`."
        )
    if recipe.experts:
        raise RuntimeSettingError(
            f"'{name}' has {len(recipe.experts)} phase experts, and this node runs one network; "
            'use its adapters with "Few-Step LoRA Loader".'
        )
    if reason := beyond_comfyui(in_comfyui(recipe)):
        raise RuntimeSettingError(
            f"'{name}' cannot be sampled in ComfyUI: {reason}; draw it with `fewstep draw`."
        )
    return found


def in_comfyui(recipe: FewStepRecipe) -> FewStepRecipe:
    """What is left of a recipe for ComfyUI to do.

    The adapter is in the weights already; and where ComfyUI's own networks of the family are not
    told a guidance scale (latent consistency models), the engine tells it to the graph itself.
    """
    is_told = recipe.guidance.mode == "embedded" and recipe.base.family not in TOLD_GUIDANCE
    return replace(recipe, lora=Lora(), guidance=Guidance() if is_told else recipe.guidance)
