"""ComfyUI's names for the weights of a diffusers network.

Where ComfyUI or diffusers itself has the names, they are asked, so that our own tables are judged
by them and not by themselves.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def unet_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stable Diffusion's UNet, by ComfyUI's own table."""
    from comfy.utils import unet_to_diffusers  # pyright: ignore[reportMissingImports]

    table = unet_to_diffusers(_unet_config(weights))
    missing = sorted(set(weights) - set(table))
    if missing:
        raise KeyError(f"ComfyUI has no name for {missing[:5]}")
    return {table[name]: value for name, value in weights.items()}


def _unet_config(weights: Mapping[str, Tensor]) -> dict[str, object]:
    down = [name.split(".") for name in weights if name.startswith("down_blocks.")]
    levels = 1 + max(int(parts[1]) for parts in down)
    resnets = [
        1 + max(int(parts[3]) for parts in down if parts[1] == str(i) and parts[2] == "resnets")
        for i in range(levels)
    ]
    return {
        "num_res_blocks": resnets,
        "channel_mult": [1] * levels,
        "transformer_depth": [
            _depth(weights, f"down_blocks.{i}.attentions.{j}.")
            for i in range(levels)
            for j in range(resnets[i])
        ],
        "transformer_depth_output": [  # ComfyUI takes them from the end
            _depth(weights, f"up_blocks.{i}.attentions.{j}.")
            for i in reversed(range(levels))
            for j in reversed(range(resnets[levels - 1 - i] + 1))
        ],
        "transformer_depth_middle": _depth(weights, "mid_block.attentions.0."),
    }


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    start = f"{prefix}transformer_blocks."
    found = {name[len(start) :].split(".")[0] for name in weights if name.startswith(start)}
    return len(found)


def wan_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan, by diffusers' converter run backwards."""
    return {_wan_name(name): value for name, value in weights.items()}


WAN_PARTS = (  # diffusers' part -> Wan's, longest first
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1.norm_", "self_attn.norm_"),
    ("attn2.norm_", "cross_attn.norm_"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
)


def _wan_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace(".scale_shift_table", ".modulation")
    for theirs, native in WAN_PARTS:
        name = name.replace(theirs, native)
    return name


def pixart_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PixArt: ComfyUI reads diffusers' names, and wants the empty caption that diffusers drops."""
    width = weights["caption_projection.linear_1.weight"].shape[1]
    return {**weights, "caption_projection.y_embedding": torch.zeros(300, width)}
