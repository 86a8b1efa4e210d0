"""Small untrained networks of several kinds: their features tell two sets of latents apart.

A random network's mean feature is a moment of its input that nobody chose; a new draw of networks
at every update looks at other moments. No normalisation layers: they would hide mean and contrast.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING_GRID = 2
"""Embeddings keep where things are, in halves of height and width."""


def pooled_grid(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) as embeddings (B, 4 C)."""
    return functional.adaptive_avg_pool2d(maps, EMBEDDING_GRID).flatten(1)


def halved(maps: Tensor) -> Tensor:
    """Maps at half the size, where there is anything to halve."""
    return functional.avg_pool2d(maps, 2) if min(maps.shape[-2:]) > 1 else maps


@final
class ConvNet(nn.Module):
    """Three 3x3 convolutions with ReLU, halved after each (as in dataset condensation)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = (channels, width, width, width)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """Embeddings (B, D) of latents (B, C, h, w)."""
        maps = x0
        for layer in self.layers:
            maps = halved(functional.relu(layer(maps)))
        return pooled_grid(maps)


@final
class WideNet(nn.Module):
    """One wide kernel, bounded responses, then a 1x1 mixture (as the first layers of AlexNet)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 7, padding=3)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x0: Tensor) -> Tensor:
        """Embeddings (B, D) of latents (B, C, h, w)."""
        return pooled_grid(functional.relu(self.second(torch.tanh(self.first(x0)))))


@final
class ResidualNet(nn.Module):
    """A stem and two residual blocks at the full size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(2)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """Embeddings (B, D) of latents (B, C, h, w)."""
        maps = self.stem(x0)
        for block in self.blocks:
            maps = functional.relu(maps + block(maps)) / 2.0**0.5  # keeps the variance
        return pooled_grid(maps)


@final
class PatchNet(nn.Module):
    """Places as tokens, one round of attention between them, then a layer of ReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 3, padding=1)
        self.heads = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, x0: Tensor) -> Tensor:
        """Embeddings (B, D) of latents (B, C, h, w)."""
        maps = self.embed(x0)
        tokens = maps.flatten(2).transpose(1, 2)
        query, key, value = self.heads(tokens).chunk(3, dim=-1)
        tokens = tokens + functional.scaled_dot_product_attention(query, key, value)
        mixed = functional.relu(self.mix(tokens)).transpose(1, 2)
        return pooled_grid(mixed.reshape(maps.shape))


KINDS: tuple[type[nn.Module], ...] = (ConvNet, WideNet, ResidualNet, PatchNet)


def random_networks(
    count: int, channels: int, width: int, *, seed: int, device: torch.device
) -> list[nn.Module]:
    """Frozen networks of all kinds in turn, weights from He's law, biases too.

    Args:
        count: How many.
        channels: Of the latents.
        width: Hidden channels.
        seed: Of their weights; the global stream of random numbers is left as it was.
        device: Where they go.
    """
    generator = torch.Generator().manual_seed(seed)
    networks: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # the layers' own start values are thrown away
        for index in range(count):
            network = KINDS[index % len(KINDS)](channels, width)
            for parameter in network.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 2
                parameter.data.normal_(generator=generator).mul_((2.0 / fan_in) ** 0.5)
            networks.append(network.requires_grad_(False).to(device))
    return networks
