"""Small LoRA files as people have them: kohya's names, with or without alpha."""

from pathlib import Path

import torch
from safetensors.torch import save_file

CROSS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_{}_attn2_to_k"
SDXL_LAYERS = {CROSS.format(0): (640, 2048), CROSS.format(1): (640, 2048)}
FLUX_LAYERS = {"lora_unet_single_blocks_0_linear1": (96, 24)}


def kohya_lora(
    path: Path,
    layers: dict[str, tuple[int, int]] = SDXL_LAYERS,
    *,
    alpha: float | None = 4.0,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A file of rank 2.

    Args:
        path: Where to.
        layers: Name -> (out, in).
        alpha: In a tensor of its own per layer; None writes none.
        metadata: Of the file.
    """
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (width, inner) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, inner, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path
