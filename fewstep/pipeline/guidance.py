"""Guidance of a recipe as call arguments: every pipeline says "off" in its own words.

Ours is `uncond + w * (cond - uncond)`, 1 = off. Read in diffusers 0.42.1; a class the table does
not know is served by its signature, and the caller is told.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewstep.errors import PipelineError
from fewstep.pipeline.families import longest_prefix
from fewstep.recipe import Guidance


@dataclass(frozen=True, slots=True)
class GuidanceRule:
    """How one family of pipelines spells guidance.

    Attributes:
        cfg: Argument that runs a second, unconditional pass; None where there is no such thing.
        off: Value of it that means one pass.
        offset: Their number minus ours (`pos + g * (pos - neg)` is w - 1).
        embedded: Argument that is an input of the network.
        embedded_off: Value that the network input needs when guidance is none; None leaves it.
        needs_negative: Whether the second pass also needs a negative prompt to happen.
    """

    cfg: str | None = "guidance_scale"
    off: float = 1.0
    offset: float = 0.0
    embedded: str | None = None
    embedded_off: float | None = None
    needs_negative: bool = False

    def is_off(self, name: str, value: float) -> bool:
        """Whether an argument's value means one pass: everything up to `off` does."""
        return name == self.cfg and value <= self.off


PLAIN = GuidanceRule()
WITH_EMBEDDED_UNET = GuidanceRule(embedded="guidance_scale")
TRUE_CFG = GuidanceRule(
    cfg="true_cfg_scale", embedded="guidance_scale", embedded_off=1.0, needs_negative=True
)
ABOVE_ZERO = GuidanceRule(off=0.0, offset=-1.0)
ONLY_EMBEDDED = GuidanceRule(cfg=None, embedded="guidance_scale")

RULES: dict[str, GuidanceRule] = {  # class name starts with -> rule; the longest fit wins
    "StableDiffusion": WITH_EMBEDDED_UNET,
    "StableDiffusionXL": WITH_EMBEDDED_UNET,
    "StableDiffusion3": PLAIN,
    "Kolors": PLAIN,
    "LatentConsistencyModel": ONLY_EMBEDDED,
    "AnimateDiff": PLAIN,
    "PixArt": PLAIN,
    "Sana": PLAIN,
    "SanaSprint": ONLY_EMBEDDED,
    "Flux": TRUE_CFG,
    "Flux2": ONLY_EMBEDDED,
    "Flux2Klein": PLAIN,
    # Qwen-Image's guidance_scale is for distilled weights it does not publish; leave it alone.
    "QwenImage": GuidanceRule(cfg="true_cfg_scale", embedded="guidance_scale", needs_negative=True),
    "Wan": PLAIN,  # guidance_scale_2 follows guidance_scale where it is not given
    "ZImage": ABOVE_ZERO,
    "Krea2": ABOVE_ZERO,
    "LTXPipeline": PLAIN,
    "LTXCondition": PLAIN,
    "LTXImageToVideo": PLAIN,
    "CogVideoX": PLAIN,
    "HunyuanVideoPipeline": TRUE_CFG,
    "HunyuanVideoImageToVideo": TRUE_CFG,
    "HunyuanVideoFramepack": TRUE_CFG,
    "HunyuanImage": GuidanceRule(cfg=None, embedded="distilled_guidance_scale"),
    "ErnieImage": PLAIN,
    "Lumina": PLAIN,
    "Chroma": PLAIN,
    "HiDream": PLAIN,
    "AuraFlow": PLAIN,
}


def rule_of(class_name: str, parameters: set[str]) -> tuple[GuidanceRule, bool]:
    """The rule of a pipeline class, and whether the table knows it (else it is a guess)."""
    prefix = longest_prefix(class_name, dict(RULES))
    if prefix is not None:
        return RULES[prefix], True
    if "true_cfg_scale" in parameters:
        return TRUE_CFG, False
    if "guidance_scale" in parameters:
        return PLAIN, False
    return GuidanceRule(cfg=None), False


def translate_guidance(pipeline_class: type, guidance: Guidance) -> dict[str, float]:
    """The arguments that make a pipeline class guide as the recipe says.

    Args:
        pipeline_class: A diffusers pipeline class.
        guidance: What the recipe says.

    Returns:
        Argument name -> value; only arguments the class takes.

    Raises:
        PipelineError: The class cannot guide that way.
    """
    name, parameters = pipeline_class.__name__, call_parameters(pipeline_class)
    rule, _ = rule_of(name, parameters)
    arguments: dict[str, float] = {}
    if rule.cfg is not None:
        on = guidance.mode in ("cfg", "true_cfg")
        arguments[rule.cfg] = guidance.scale + rule.offset if on else rule.off
    if guidance.mode == "embedded" and rule.embedded is not None:
        arguments[rule.embedded] = guidance.scale
    elif guidance.mode == "none" and rule.embedded_off is not None and rule.embedded is not None:
        arguments[rule.embedded] = rule.embedded_off
    needed = {"none": None, "embedded": rule.embedded}.get(guidance.mode, rule.cfg)
    if guidance.mode != "none" and (needed is None or needed not in parameters):
        raise PipelineError(
            f"this recipe's guidance is {guidance.mode!r}, but {name} has no argument for it; "
            "use the pipeline class the adapter was made for"
        )
    return {key: value for key, value in arguments.items() if key in parameters}


def call_parameters(pipeline_class: type) -> set[str]:
    """Names of the arguments a pipeline class is called with."""
    call: Callable[..., Any] = pipeline_class.__call__
    return set(inspect.signature(call).parameters)
