"""What a recipe's guidance is in ComfyUI: its cfg, or a value in the conditioning. No ComfyUI.

ComfyUI's cfg is the recipe's scale: `uncond + scale * (cond - uncond)`, 1 runs the network once.
"""

from dataclasses import dataclass

from fewstep.errors import PipelineError
from fewstep.recipe import FewStepRecipe


@dataclass(frozen=True, slots=True)
class GuidanceChoice:
    """How to guide.

    Attributes:
        cfg: ComfyUI's cfg; 1 is off.
        embedded: What the network is told (the core node FluxGuidance sets the same); None leaves
            the conditioning as it is.
        warning: What the user should know of a value that is not the recipe's; "" for nothing.
    """

    cfg: float
    embedded: float | None = None
    warning: str = ""


def choose_guidance(
    recipe: FewStepRecipe, guidance: float | None, *, has_negative: bool
) -> GuidanceChoice:
    """The guidance to sample with.

    Args:
        recipe: In force.
        guidance: The user's own scale; None takes the recipe's.
        has_negative: Whether a negative prompt is connected.

    Raises:
        PipelineError: The guidance needs a negative prompt.
    """
    trained = recipe.guidance
    scale = trained.scale if guidance is None else guidance
    warning = "" if scale == trained.scale else _warning(recipe, scale)
    if trained.mode == "embedded":
        return GuidanceChoice(1.0, scale, warning)
    if scale != 1.0 and not has_negative:
        where = " in this recipe" if guidance is None else ""
        raise PipelineError(
            f"Guidance is {scale:.1f}{where}: connect a negative prompt, or set guidance to 1.0."
        )
    return GuidanceChoice(scale, None, warning)


def _warning(recipe: FewStepRecipe, scale: float) -> str:
    trained = recipe.guidance
    text = f"guidance {scale:.1f} on a recipe trained for {trained.scale:.1f}"
    if trained.mode != "embedded" and scale > 1.0 and trained.scale == 1.0:
        return f"{text}: expect burnt colours and half the speed."
    return f"{text}: expect other contrast than the authors meant."
