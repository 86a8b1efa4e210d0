"""A small autoencoder as the pair of files that ComfyUI lists as "taesd3" or "taesd"."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny.parts import stock

CLAMP = 1
"""Layers that TAESD's decoder has before diffusers' first: a clamp without weights."""


def save_random_vae(folder: Path, name: str = "taesd3", channels: int = 16) -> str:
    """One with random weights.

    Returns:
        The name for VAELoader.
    """
    torch.manual_seed(1)
    return save_vae(folder, stock.AutoencoderTiny(latent_channels=channels).state_dict(), name)


def save_vae(folder: Path, weights: Mapping[str, Tensor], name: str = "taesd3") -> str:
    """Write the weights of an AutoencoderTiny into vae_approx/ of a folder.

    Returns:
        The name for VAELoader.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in weights.items():
        part, _, index, rest = key.split(".", 3)
        place = int(index) + (CLAMP if part == "decoder" else 0)
        parts[part][f"{place}.{rest}"] = value.float().contiguous()
    for part, tensors in parts.items():
        save_file(tensors, folder / "vae_approx" / f"{name}_{part}.safetensors")
    return name
