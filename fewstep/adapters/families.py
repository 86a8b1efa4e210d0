"""Guess a base family from LoRA module names. A guess is for people; nothing is loaded by it."""

import re
from collections.abc import Iterable, Sequence

from fewstep.adapters.modules import LoraModule

KNOWN = (
    *("sd15", "sd2", "sdxl", "sd3", "flux", "pixart", "sana", "qwen-image", "z-image", "wan"),
    *("ltx", "hunyuan-video", "cogvideox"),
)
TEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
"""Text features entering a UNet's cross attention."""
QWEN_WIDTH = 3072
"""Width that tells Qwen-Image from SD3 where only attention is adapted: SD3 has 1536 or 2432."""
LTX_WIDTHS = {2048, 4096}
"""Widths of LTX's 2B and 13B models; PixArt has 1152, Sana 1152 or 2240, CogVideoX 1920 or 3072."""
_UNET = re.compile(r"(?:^|_)(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks)_")
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "hunyuan-video",
        re.compile(
            r"^context_embedder_(?:token_refiner|time_text_embed|proj_in)|^txt_in_[itc]|"
            r"^double_blocks_\d+_(?:img|txt)_(?:mod_linear|mlp_fc)|"
            # FLUX has 19 and 38 blocks, HunyuanVideo 20 and 40.
            r"^(?:double_blocks|transformer_blocks)_19_(?:img_|attn_add)|"
            r"^single_(?:transformer_)?blocks_3[89]_"
        ),
    ),
    ("flux", re.compile(r"^(?:single_transformer_blocks|double_blocks|single_blocks)_\d")),
    ("qwen-image", re.compile(r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_")),
    ("sana", re.compile(r"^transformer_blocks_\d+_ff_conv_|^blocks_\d+_mlp_\w+_conv")),
    ("pixart", re.compile(r"^blocks_\d+_cross_attn_(?:q|kv)_linear|^adaln_single_emb_res")),
    ("cogvideox", re.compile(r"^patch_embed_text_proj|^transformer_blocks_\d+_norm[12]_linear$")),
    ("ltx", re.compile(r"^patchify_proj|^proj_in$")),
    ("sd3", re.compile(r"^joint_blocks_\d|^transformer_blocks_\d+_ff_context_|_attn2?_qkv$")),
    ("z-image", re.compile(r"^(?:layers|noise_refiner|context_refiner)_\d+_attention_")),
    ("wan", re.compile(r"^blocks_\d+_(?:attn[12]_|self_attn_|ffn_)")),
    ("sana", re.compile(r"^time_embed_emb_")),
    ("pixart", re.compile(r"^transformer_blocks_\d+_ff_net_|^adaln_single_|^caption_projection_")),
)
_JOINT = re.compile(r"^transformer_blocks_\d+_attn_(?:add_[qkv]_proj|to_[qkv]|to_add_out)$")
_SELF = re.compile(r"^transformer_blocks_\d+_attn1_to_q$")
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
    if LTX_WIDTHS & {width for name, width in widths.items() if _SELF.match(name)}:
        return "ltx"
    for family, pattern in _NAMES:
        # Joint attention beside "ff_net" is an MMDiT, not PixArt.
        if not (joint and family in ("sana", "pixart", "cogvideox")) and any(
            map(pattern.search, widths)
        ):
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


_BASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sdxl", ("down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight")),
    ("sd15", ("down_blocks.0.resnets.0.conv1.weight",)),
    ("hunyuan-video", ("context_embedder.proj_in.weight", "norm_out.linear.weight")),
    ("flux", ("single_transformer_blocks.0.proj_mlp.weight",)),
    ("flux2", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",)),
    ("sd3", ("pos_embed.proj.weight", "context_embedder.weight")),
    ("pixart", ("adaln_single.linear.weight", "pos_embed.proj.weight")),
    ("sana", ("transformer_blocks.0.ff.conv_inverted.weight",)),
    ("qwen-image", ("transformer_blocks.0.img_mod.1.weight",)),
    ("z-image", ("layers.0.attention.to_q.weight", "cap_embedder.1.weight")),
    ("wan", ("condition_embedder.time_proj.weight",)),
    ("ltx", ("time_embed.linear.weight", "proj_in.weight")),
    ("cogvideox", ("patch_embed.text_proj.weight",)),
)
"""Parameters that together only this family's diffusers denoiser has."""


def family_of_base(base_parameters: Iterable[str]) -> str | None:
    """The family of a base from its diffusers parameter names; None for one not known.

    SD 1 and SD 2 name their layers alike and give "sd15".
    """
    names = set(base_parameters)
    for family, telling in _BASES:
        if names.issuperset(telling):
            return family
    return None
