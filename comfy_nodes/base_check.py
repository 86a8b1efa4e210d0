"""Which base a MODEL is, and whether an adapter was trained for it. Imports nothing of ComfyUI.

Told by the names of ComfyUI's classes, so that a class this table does not know (a newer model, a
node pack's own) is no error: what is not known is not compared.
"""

from collections.abc import Mapping
from typing import Any

from fewstep.comfy_nodes.recipe_limits import family_title
from fewstep.recipe import FewStepRecipe

FAMILIES: dict[str, str] = {
    "SD21UNCLIP": "sd2",
    "SD15_instructpix2pix": "sd15",
    "SDXL": "sdxl",
    "SDXL_instructpix2pix": "sdxl",
    "SD3": "sd3",
    "AuraFlow": "auraflow",
    "StableAudio1": "stable-audio",
    "HunyuanDiT": "hunyuan-dit",
    "PixArt": "pixart",
    "Flux": "flux",
    "Flux2": "flux2",
    "Chroma": "chroma",
    "ChromaRadiance": "chroma",
    "GenmoMochi": "mochi",
    "LTXV": "ltx",
    "LTXAV": "ltx2",
    "HunyuanVideo": "hunyuan-video",
    "HunyuanVideoI2V": "hunyuan-video",
    "HunyuanVideoSkyreelsI2V": "hunyuan-video",
    "HunyuanVideo15": "hunyuan-video",
    "HunyuanImage21": "hunyuan-image",
    "WAN21": "wan",
    "WAN21_Vace": "wan",
    "WAN21_Camera": "wan",
    "WAN22": "wan",
    "HiDream": "hidream",
    "ACEStep": "ace-step",
    "Omnigen2": "omnigen2",
    "QwenImage": "qwen-image",
    "Kandinsky5": "kandinsky5",
    "Kandinsky5Image": "kandinsky5",
}
"""Class of `MODEL.model` -> family as recipes spell it."""
TEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
"""Text features entering the UNet of a plain BaseModel."""
PREDICTIONS: dict[str, str | None] = {
    "CONST": "flow",
    "EDM": None,
    "V_PREDICTION": "v",
    "IMG_TO_IMG": None,
    "X0": "x0",
    "COSMOS_RFLOW": None,
    "EPS": "epsilon",
}
"""Class among the bases of `model_sampling` -> prediction as recipes spell it; None: neither."""
NODE_NAMES = {"epsilon": "eps", "v": "v_prediction", "x0": "x0"}
"""What the core node ModelSamplingDiscrete calls a prediction."""


def family_of(model: Any) -> str | None:
    """The family of a MODEL as recipes spell it; None for one that is not known."""
    base = model.model
    config: Mapping[str, Any] = base.model_config.unet_config
    kind = type(base).__name__
    if kind == "BaseModel":
        return TEXT_WIDTHS.get(config.get("context_dim", 0))
    if kind == "Lumina2":
        return "z-image" if config.get("z_image_modulation") else "lumina2"
    return FAMILIES.get(kind)


def prediction_of(model: Any) -> str | None:
    """What ComfyUI takes the network's output for; None where recipes have no word for it."""
    for base in type(model.get_model_object("model_sampling")).__mro__:
        if base.__name__ in PREDICTIONS:
            return PREDICTIONS[base.__name__]
    return None


def base_problem(recipe: FewStepRecipe, model: Any) -> str | None:
    """Why a MODEL is not what a recipe's adapter was trained on, in two sentences; or None."""
    wanted = recipe.base.family.lower().replace("_", "-")
    family, prediction = family_of(model), prediction_of(model)
    is_family = family in (None, wanted)
    if is_family and prediction in (None, recipe.base.prediction):
        return None
    title = family_title(wanted)
    trained = f"This adapter was trained for {title} ({recipe.base.prediction})"
    got = f"but MODEL is {family_title(family or wanted)} ({prediction or 'unknown'})"
    advice = f"Load {_article(title)} {title} checkpoint"
    if is_family and recipe.base.prediction in NODE_NAMES:
        node = NODE_NAMES[recipe.base.prediction]
        advice = f'Put "ModelSamplingDiscrete" with "{node}" before this node'
    return f'{trained}, {got}. {advice}, or set base_check to "warn".'


def _article(title: str) -> str:
    is_spelled = title[1:2].isupper() and title[0] in "AEFHILMNORSX"
    return "an" if is_spelled or title[0] in "AEIOUaeiou" else "a"
