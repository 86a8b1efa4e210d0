"""Guess a base family from LoRA module names. A guess is for people; nothing is loaded by it."""

import re
from collections.abc import Sequence

from fewstep.adapters.modules import LoraModule

KNOWN = ("sd15", "sd2", "sdxl", "sd3", "flux", "pixart", "sana", "qwen-image", "z-image", "wan")
TEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
"""Text features entering a UNet's cross attention."""
QWEN_WIDTH = 3072
"""Width that tells Qwen-Image from SD3 where only attention is adapted: SD3 has 1536 or 2432."""
_UNET = re.compile(r"(?:^|_)(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks)_")
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("flux", re.compile(r"^(?:single_transformer_blocks|double_blocks|single_blocks)_\d")),
    ("qwen-image", re.compile(r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_")),
    ("sd3", re.compile(r"^joint_blocks_\d|^transformer_blocks_\d+_ff_context_|_attn2?_qkv$")),
    ("z-image", re.compile(r"^(?:layers|noise_refiner|context_refiner)_\d+_attention_")),
    ("wan", re.compile(r"^blocks_\d+_(?:attn[12]_|self_attn_|ffn_)")),
    ("sana", re.compile(r"^transformer_blocks_\d+_ff_conv_|^time_embed_emb_")),
    ("pixart", re.compile(r"^transformer_blocks_\d+_ff_net_|^adaln_single_|^caption_projection_")),
)
_JOINT = re.compile(r"^transformer_blocks_\d+_attn_(?:add_[qkv]_proj|to_[qkv]|to_add_out)$")
_CROSS = re.compile(r"^transformer_blocks_\d+_attn[12]_to_")


def guess_family(modules: Sequence[LoraModule]) -> str | None:
    """The family these denoiser modules look like, "a or b" where names cannot tell, or None."""
    widths = {
        module.name.module.replace(".", "_"): module.down.shape[1]
        for module in modules
        if not module.name.is_text_encoder
    }
    if any(_UNET.search(name) for name in widths):
        return _unet_family(widths)
    joint = [width for name, width in widths.items() if _JOINT.match(name)]
    for family, pattern in _NAMES:
        # Joint attention beside "ff_net" is an MMDiT, not PixArt.
        if not (joint and family in ("sana", "pixart")) and any(map(pattern.search, widths)):
            return family
    if joint:
        return "qwen-image" if QWEN_WIDTH in joint else "sd3"
    if any(_CROSS.match(name) for name in widths):
        return "pixart or sana"
    return None


def _unet_family(widths: dict[str, int]) -> str:
    for name, width in widths.items():
        if re.search(r"_attn2_to_[kv]$", name) and width in TEXT_WIDTHS:
            return TEXT_WIDTHS[width]
    # SDXL stacks several transformer blocks per attention; SD1 and SD2 have one.
    deep = any(re.search(r"_transformer_blocks_[1-9]", name) for name in widths)
    return "sdxl" if deep or any(n.startswith("add_embedding_") for n in widths) else "sd15"
