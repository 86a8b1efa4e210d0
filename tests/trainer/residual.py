"""The exact Gaussian teacher with room to learn: a small network with a time embedding, cancelled.

    x0 = exact(x, t) + network(x, t) - network_as_it_began(x, t)

so the frozen base is the exact teacher, and adapters, rotations and two-time heads have weights to
change.
"""

import copy
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional

from fewstep.heads.two_time import sinusoid
from fewstep.recipe import Base, Schedule
from fewstep.trainer.backbones.condition import Condition
from tests.trainer.analytic import ExactBackbone, ExactDenoiser

CHANNELS, WIDTH = 32, 32


class Small(nn.Module):
    """(value, timestep) -> value, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = TimestepEmbedding(CHANNELS, WIDTH)
        self.first, self.second = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedded = self.time_embedding(sinusoid(timestep / 50.0, CHANNELS).to(sample.dtype))
        embedded = embedded.reshape(len(sample), *[1] * (sample.ndim - 1), WIDTH)
        pair = torch.stack([sample, torch.ones_like(sample)], -1)
        hidden = functional.silu(self.first(pair) + embedded)
        return self.last(functional.silu(self.second(hidden))).squeeze(-1)


class ResidualDenoiser(nn.Module):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.small = Small()
        self.exact = ExactDenoiser()
        self._began: list[Any] = [copy.deepcopy(self.small).requires_grad_(False)]  # no submodule

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        learnt = self.small(sample, timestep) - self._began[0](sample, timestep)
        return self.exact(sample, timestep) + learnt


class ResidualBackbone(ExactBackbone):
    """`ExactBackbone` over it; its network gives velocities, as flow teachers do."""

    lora_targets = (r"small\.(first|second|last|time_embedding\.linear_\d)$",)

    def __init__(self) -> None:
        super().__init__()
        self.prediction = "flow"
        self.residual = ResidualDenoiser()

    @property
    def denoiser(self) -> nn.Module:
        return self.residual

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        sigma = (timestep / 1000.0).reshape(-1, 1, 1, 1)
        return (sample - network(sample, timestep)) / sigma

    def base(self, model_id: str) -> Base:
        return Base(family="toy", prediction="flow", schedule=Schedule(kind="flow", shift=1.0))
