"""This process among its peers: adapters are replicated, their gradients averaged once a step.

The frozen base needs no communication, so no wrapper is put around it: every process computes its
samples' gradients, and the few megabytes of adapter gradients are averaged in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """This process.

    Attributes:
        rank: 0 is the one that writes.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and draws bars."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over processes, in one reduction."""
        if self.size == 1:
            return
        for parameter in parameters:  # a process whose part did not reach it still takes part
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters])  # pyright: ignore
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, mean in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = mean.reshape(parameter.shape)


def summed(values: Tensor) -> Tensor:
    """The sum of every process's values; the values themselves in one process."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values
