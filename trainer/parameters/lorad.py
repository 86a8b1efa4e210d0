"""LoRaD: a role rotates pairs of weight columns by low-rank angles, so their norms stay.

    theta = A B, wrapped to (-pi, pi];   (W[:, 2j], W[:, 2j + 1]) rotated by theta[:, j], row by row

Source:
    WaDi, arXiv:2603.08258; `fewstep.heads.lorad` has the arithmetic that hosts share.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.trainer.parameters.lora import Base, Update


class LoradUpdate(Update):
    """Low-rank rotation of a linear layer; changes nothing until trained.

    Args:
        base: A layer with an even number of inputs.
        rank: Of the angles.
        generator: Source of the random B, on the CPU; A starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        half, device = base.in_features // 2, base.weight.device
        bound = math.sqrt(6.0 / (rank + half))  # Xavier
        b = torch.empty(rank, half).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.b = nn.Parameter(b.to(device))

    def apply_to(self, base: Base, x: Tensor, scale: float) -> Tensor:
        from fewstep.heads.lorad import rotate

        weight = rotate(base.weight, scale * (self.a @ self.b))
        return functional.linear(x, weight.to(x.dtype), base.bias)

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "lorad_A.weight", self.a
        yield "lorad_B.weight", self.b
