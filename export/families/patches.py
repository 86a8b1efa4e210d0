"""Patch embeddings with positions computed for any size, in single precision."""

from typing import Any

import torch
from torch import Tensor

from fewstep.export.families.rotary import rates


class SincosPatches:
    """What diffusers' PatchEmbed computes, for sizes that stay free.

    The stock module compares the size with the one it was made for, which tracing would fix, and
    makes its sinusoids in double precision.

    Args:
        stock: A PatchEmbed whose position table is not cropped.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.rates = None
        if stock.pos_embed is not None:
            self.rates = rates(stock.pos_embed.shape[-1] // 2, 10000.0).float()

    def __call__(self, latent: Tensor) -> Tensor:
        """Latents (B, C, h, w) as tokens (B, h / p * w / p, D)."""
        stock = self.stock
        grid = stock.proj(latent)
        tokens = grid.flatten(2).transpose(1, 2)
        if stock.layer_norm:
            tokens = stock.norm(tokens)
        if self.rates is None:
            return tokens
        rows, columns = self._waves(grid.shape[-2]), self._waves(grid.shape[-1])
        count, width = rows.shape[0], columns.shape[0]
        across = columns[None].expand(count, -1, -1)
        down = rows[:, None].expand(-1, width, -1)
        places = torch.cat([across, down], dim=-1).flatten(0, 1)
        return (tokens + places[None]).to(latent.dtype)

    def _waves(self, count: int) -> Tensor:
        assert self.rates is not None
        steps = torch.arange(count, dtype=torch.float32)
        scale = self.stock.base_size / self.stock.interpolation_scale
        angle = (steps * scale / (steps[-1] + 1.0))[:, None] * self.rates
        return torch.cat([angle.sin(), angle.cos()], dim=-1)
