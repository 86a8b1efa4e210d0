"""A backbone whose teacher is exact: data N(mean, variance) and a linear network with adapters.

The network answers x0 = W f(x, t) + c with features f that hold the exact posterior mean, so the
frozen base is the perfect teacher and low-rank updates of W are a linear student and critic.
"""

import torch
from torch import Tensor, nn

from fewstep.noise_schedule import Flow
from fewstep.recipe import Base, Schedule
from fewstep.trainer.backbone import Backbone, Condition
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.lora import LoraBank, attach
from fewstep.trainer.prompts import PromptBook
from fewstep.trainer.roles import Role

MEAN, VARIANCE = 1.5, 0.25


class ExactDenoiser(nn.Module):
    """x0 of data N(1.5, 0.25) in each of D dimensions, as a frozen linear layer of features."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        self.dimensions = dimensions
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[0, 0] = 1.0
            self.head.bias.zero_()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / 1000.0).reshape(-1, 1, 1, 1)
        alpha = 1.0 - sigma
        pull = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        exact = MEAN + pull * (sample - alpha * MEAN)
        one = torch.ones_like(sample)
        features = [exact, sample, sigma * sample, alpha * sample, one, sigma * one]
        return self.head(torch.stack(features, dim=-1)).squeeze(-1)


class ExactBackbone(Backbone):
    """`Backbone` over `ExactDenoiser`; conditions are empty."""

    family, component = "toy", "transformer"

    def __init__(self, dimensions: int) -> None:
        self.network = ExactDenoiser(dimensions)
        self.schedule, self.prediction, self.max_sequence_length = Flow(), "x0", 0

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    def encode(self, prompts: list[str]) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1), None)

    def output(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.network(sample, timestep)

    def base(self, model_id: str) -> Base:
        return Base(family="toy", prediction="x0", schedule=Schedule(kind="flow", shift=1.0))


def exact_setup(dimensions: int = 4) -> tuple[ExactBackbone, LoraBank, PromptBook]:
    """Backbone, bank with student, critic and average, and a book of one prompt."""
    backbone = ExactBackbone(dimensions)
    bank = attach(backbone.denoiser, [r"head"])
    generator = torch.Generator().manual_seed(0)
    for role in (Role.STUDENT, Role.CRITIC, Role.AVERAGE):
        bank.add(role, rank=1, alpha=1.0, generator=generator)
    empty = backbone.encode([""])
    return backbone, bank, PromptBook(("",), empty, empty)


DEFAULTS = TrainConfig()
