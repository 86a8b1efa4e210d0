"""Names of the Stable Diffusion UNet in its authors' code (sgm, ldm) and in diffusers.

diffusers groups blocks by resolution, the original counts them through: `input_blocks.4.1` is
`down_blocks.1.attentions.0` where a resolution has two layers, as in SD 1, SD 2 and SDXL.
"""

from collections.abc import Iterator

LEVELS = 4
"""Resolutions: SD 1 and 2 have four, SDXL three; surplus rules name nothing."""
LAYERS = 2
"""Layers per resolution of SD 1, SD 2 and SDXL."""
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
}
_IN_BLOCK = (
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
_REST = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


def unet_rules(layers: int = LAYERS) -> Iterator[tuple[str, str]]:
    """Pairs of (original, diffusers) module names; `{}` is the transformer block's number.

    Args:
        layers: Layers per resolution.
    """
    yield from _REST.items()
    for level in range(LEVELS):
        first = level * (layers + 1)
        for layer in range(layers):
            down = f"input_blocks.{first + 1 + layer}"
            yield from _resnet(f"{down}.0", f"down_blocks.{level}.resnets.{layer}")
            yield from _attention(f"{down}.1", f"down_blocks.{level}.attentions.{layer}")
        down = f"down_blocks.{level}.downsamplers.0.conv"
        yield f"input_blocks.{first + layers + 1}.0.op", down
        for layer in range(layers + 1):
            up = f"output_blocks.{first + layer}"
            yield from _resnet(f"{up}.0", f"up_blocks.{level}.resnets.{layer}")
            yield from _attention(f"{up}.1", f"up_blocks.{level}.attentions.{layer}")
        last = f"output_blocks.{first + layers}"
        for place in (1, 2):  # after the attention, where there is one
            yield f"{last}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _resnet(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _RESNET.items():
        yield f"{original}.{ours}", f"{diffusers}.{theirs}"


def _attention(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for name in (
        "norm",
        "proj_in",
        "proj_out",
        *(f"transformer_blocks.{{}}.{n}" for n in _IN_BLOCK),
    ):
        yield f"{original}.{name}", f"{diffusers}.{name}"
