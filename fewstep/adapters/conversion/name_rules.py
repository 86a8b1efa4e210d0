"""What one layer is called in diffusers and in the model's own code, for one base.

The native names are those of the authors' checkpoints: ComfyUI loads them as they are, and
trainers of the kohya kind flatten them. A fused native `qkv` is three diffusers modules.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from fewstep.adapters.conversion.image_names import (
    FLUX,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    Z_IMAGE,
)
from fewstep.adapters.conversion.rules import Rule
from fewstep.adapters.conversion.unet_names import LAYERS, unet_rules
from fewstep.adapters.conversion.video_names import COGVIDEOX, HUNYUAN_VIDEO, LTX, WAN

UNETS = ("sd15", "sd2", "sdxl")


def unet(layers: int = LAYERS) -> tuple[Rule, ...]:
    """Rules of a Stable Diffusion UNet with this many layers per resolution."""
    return tuple(Rule(native, (diffusers,)) for native, diffusers in unet_rules(layers))


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(UNETS, unet()),
    "sd3": SD3,
    "flux": FLUX,
    "pixart": PIXART,
    "sana": SANA,
    "sana-sprint": SANA,
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
    "wan": WAN,
    "ltx": LTX,
    "hunyuan-video": HUNYUAN_VIDEO,
    "cogvideox": COGVIDEOX,
}
"""Family as recipes spell it -> its rules."""


@dataclass(frozen=True, slots=True)
class NativeModule:
    """A rule with its numbers filled in, for one base.

    Attributes:
        name: The native module.
        parts: diffusers modules, top to bottom; all are in the base.
        rows: Output size of each part.
        swaps: Whether halves of the rows change places between the two namings.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    swaps: bool = False


def native_modules(family: str, weights: Mapping[str, tuple[int, ...]]) -> tuple[NativeModule, ...]:
    """The native modules of one base.

    Args:
        family: A key of `RULES`.
        weights: diffusers module name -> shape of its weight.

    Returns:
        Every module a rule names and whose parts are all there.
    """
    found = []
    for rule in _rules_of(family, weights):
        pattern = pattern_of(rule.parts[0])
        for module in weights:
            if match := pattern.fullmatch(module):
                parts = tuple(filled(part, match.groups()) for part in rule.parts)
                if all(part in weights for part in parts):
                    swaps = rule.swaps and _is_pair(weights[parts[0]])
                    rows = tuple(weights[part][0] for part in parts)
                    found.append(
                        NativeModule(filled(rule.native, match.groups()), parts, rows, swaps)
                    )
    return tuple(found)


def _rules_of(family: str, weights: Iterable[str]) -> tuple[Rule, ...]:
    if family not in UNETS:
        return RULES[family]
    layer = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.conv1")
    return unet(sum(layer.fullmatch(name) is not None for name in weights) or LAYERS)


@cache
def pattern_of(template: str, *, flat: bool = False) -> re.Pattern[str]:
    """A template as a pattern whose groups are its numbers; flat: with "_" for "."."""
    text = template.replace(".", "_") if flat else template
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))


def filled(template: str, numbers: Iterable[str]) -> str:
    """A template with its numbers put in."""
    return template.format(*numbers)


def _is_pair(weight: tuple[int, ...]) -> bool:
    """Whether it makes one shift and one scale, (2 width, width); blocks have six or nine."""
    return len(weight) == 2 and weight[0] == 2 * weight[1]
