"""What ComfyUI can sample: its model families, and the recipes that are beyond it. No ComfyUI here.

Facts of ComfyUI 0.8; newer cores have more families, whose LoRAs load and sample by their own
recipes all the same: the table is for presets and for words.
"""

from fewstep.recipe import FewStepRecipe

FAMILIES = {
    "sd15": "SD 1.5",
    "sd2": "SD 2",
    "sdxl": "SDXL",
    "sd3": "SD3",
    "flux": "Flux",
    "flux2": "Flux.2",
    "pixart": "PixArt",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "wan": "Wan",
    "hunyuan-video": "HunyuanVideo",
    "ltx": "LTX-Video",
    "ltx2": "LTX-2",
}
"""Picture and video families of recipes that ComfyUI has a model of -> what people call them."""

TOLD_GUIDANCE = ("flux", "flux2", "hunyuan-video")
"""Families whose networks take the guidance scale as an input (the node FluxGuidance sets it)."""


def family_title(family: str) -> str:
    """What people call a base family; its short name where the table has none."""
    return FAMILIES.get(family, family)


def beyond_comfyui(recipe: FewStepRecipe) -> str | None:
    """Why a MODEL of ComfyUI cannot be sampled by this recipe, as the end of a sentence; or None.

    Whether a recipe that can be sampled fits the MODEL at hand is not looked at here.
    """
    if recipe.sampler.kind == "flow_map":
        return "its network is told the time a step ends at too, which no MODEL of ComfyUI takes"
    if recipe.sampler.kind == "policy":
        return "its network returns a policy from a widened output layer, which ComfyUI has not"
    if recipe.base.schedule.kind == "trigflow":
        return "ComfyUI has no model with a TrigFlow schedule"
    if recipe.lora.kind == "lorad":
        return "its adapter holds rotations (LoRaD), which ComfyUI does not apply"
    if recipe.routes:
        return "its adapter holds several experts of which the prompt chooses one"
    if any(len(set(grid.sizes)) > 1 for grid in recipe.grids):
        return "its samples grow from step to step, and a ComfyUI latent keeps its size"
    if recipe.guidance.mode == "embedded" and recipe.base.family not in TOLD_GUIDANCE:
        return (
            f"its network is told the guidance scale, and ComfyUI's "
            f"{family_title(recipe.base.family)} models have no such input"
        )
    if recipe.second_stage is not None:
        return "it has a second stage, which enlarges the result of the first"
    if recipe.base.schedule.kind == "flow" and recipe.base.prediction != "flow":
        return f"flow models of ComfyUI predict a velocity, not {recipe.base.prediction}"
    return None
