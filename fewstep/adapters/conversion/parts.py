"""Which tensor of an adapted layer a name means, for every kind of adapter there is a name for."""

import re
from typing import Literal

Part = Literal[
    "down",
    "up",
    "mid",
    "alpha",
    "magnitude",
    "up_bias",
    "diff",
    "diff_b",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "set_weight",
    "unknown",
]
_KRONECKER: tuple[Part, ...] = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
)
_ENDINGS: tuple[tuple[str, Part], ...] = (
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_A", "down"),
    (".lora_B", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_mid.weight", "mid"),
    (".lora_B.bias", "up_bias"),
    (".lora_B.default.bias", "up_bias"),
    (".lora_up.bias", "up_bias"),
    (".alpha", "alpha"),
    (".dora_scale", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector.default", "magnitude"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".diff", "diff"),
    (".w_norm", "diff"),
    (".diff_b", "diff_b"),
    (".b_norm", "diff_b"),
    (".set_weight", "set_weight"),
    *((f".{part}", part) for part in _KRONECKER),
)
_LONGEST_FIRST = sorted(_ENDINGS, key=lambda entry: -len(entry[0]))
_OLD_PROCESSOR = re.compile(
    r"\.processor\.(to_[qkv]|to_out)_lora\.(?:(down|up)\.weight|(alpha)|(lora_magnitude_vector)\..*)$"
)
_PREFIXES = (
    *("base_model.model.", "base_model.", "diffusion_model.", "model.diffusion_model.", "model."),
    *("transformer_2.", "transformer.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_"),
)


def split_name(name: str) -> tuple[str, Part]:
    """A tensor's name as (the layer with whatever prefix, the part)."""
    if match := _OLD_PROCESSOR.search(name):
        linear = "to_out.0" if match[1] == "to_out" else match[1]
        body = f"{name[: match.start()]}.{linear}"
        if match[2]:
            return body, "down" if match[2] == "down" else "up"
        return body, "alpha" if match[3] else "magnitude"
    for ending, part in _LONGEST_FIRST:
        if name.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], part
    return name, "unknown"


def without_prefixes(body: str) -> list[str]:
    """The layer's name with ever more of the known prefixes taken off, itself first."""
    found = [body]
    for name in found:  # grows while it is walked
        shorter = (name.removeprefix(prefix) for prefix in _PREFIXES)
        found += [rest for rest in dict.fromkeys(shorter) if rest and rest not in found]
    return found
