"""Bases whose every answer is known: a class-conditional mixture, and exact Gaussian maps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.noise_schedule import Flow, NoiseSchedule
from fewstep.recipe import Base, Schedule
from fewstep.toy import GaussianMixture
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.probe import Probe
from fewstep.trainer.context import Setting
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.levels import Levels, levels_at
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.routes import SingleRoute

SHAPE = (2, 1, 1)
PROMPTS = ("left", "right")
NULL = -1.0
MIXTURE = GaussianMixture(
    torch.tensor([[-1.5, 0.5], [1.0, -0.5], [2.0, 1.5]], dtype=torch.float64),
    (0.2, 0.1, 0.3),
    (0.5, 0.3, 0.2),
    labels=(0, 1, 1),
)


class Answer(nn.Module):
    """A network from a formula: (sample, levels, labels) -> x0; label -1 is the null prompt."""

    def __init__(
        self, formula: Callable[[Tensor, Levels, Tensor], Tensor], schedule: NoiseSchedule
    ) -> None:
        super().__init__()
        self.formula = formula
        self.schedule = schedule
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        position = timestep.double() / self.schedule.uniform_timesteps(1)[0]
        levels = levels_at(self.schedule, position)
        labels = torch.zeros(len(sample)) if labels is None else labels
        return self.formula(sample, levels, labels).to(sample.dtype) + self.offset


def mixture_x0(sample: Tensor, levels: Levels, labels: Tensor) -> Tensor:
    """Exact denoiser of `MIXTURE`, class by class; the null prompt is the whole mixture."""
    exact = sample.double()
    is_null = (labels < 0).reshape(-1, 1, 1, 1)
    cond = MIXTURE.denoise(exact, levels, labels.clamp(min=0))
    return torch.where(is_null, MIXTURE.denoise(exact, levels), cond)


class MixtureBackbone(Backbone):
    """The exact teacher of `MIXTURE`; other roles are `own_networks`."""

    family, component = "toy", "transformer"
    lora_targets = ()

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(None, schedule, "x0", 0)  # pyright: ignore[reportArgumentType]
        self.exact = Answer(mixture_x0, schedule)

    @property
    def denoiser(self) -> nn.Module:
        return self.exact

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ()

    def encode(self, prompts: list[str]) -> Condition:
        labels = [float(PROMPTS.index(prompt)) if prompt else NULL for prompt in prompts]
        return Condition(torch.tensor(labels).reshape(-1, 1, 1))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        return network(sample, timestep, condition.sequence[:, 0, 0])

    def base(self, model_id: str) -> Base:
        return Base(family="toy", prediction="x0", schedule=Schedule(kind="flow", shift=1.0))

    def latent_shape(
        self, height_px: int = 0, width_px: int = 0, num_frames: int = 0
    ) -> tuple[int, ...]:
        return SHAPE


def mixture_setting(schedule: NoiseSchedule | None = None) -> Setting:
    """Setting of the mixture with both prompts; student and critic are shifted mixtures."""
    backbone = MixtureBackbone(Flow() if schedule is None else schedule)
    for name, shift in (("student", 0.3), ("critic", -0.2)):
        backbone.own_networks[name] = Answer(
            lambda s, v, k, shift=shift: mixture_x0(s, v, k) + shift, backbone.schedule
        )
    book = PromptBook(PROMPTS, backbone.encode(list(PROMPTS)), backbone.encode([""]))
    cast = Cast(backbone.denoiser, backbone.own_networks)
    return Setting(backbone, cast, book, None, (SHAPE,), SingleRoute())


def mixture_probe(backbone: MixtureBackbone, count: int = 16, low: float = 0.1) -> Probe:
    """Noisy samples of mixed prompts at positions `low` to 0.9."""
    generator = torch.Generator().manual_seed(1)
    levels = levels_at(backbone.schedule, torch.linspace(low, 0.9, count))
    sample = torch.randn((count, *SHAPE), generator=generator)
    condition = backbone.encode([PROMPTS[i % 2] for i in range(count)])
    return Probe(backbone, sample, levels, sample, condition, backbone.encode([""]))


def gaussian_end(mean: float, variance: float) -> Callable[[Tensor, Levels, Tensor], Tensor]:
    """Where the exact ODE of N(mean, variance) ends: (x - alpha m) / std is constant on it."""

    def formula(sample: Tensor, levels: Levels, labels: Tensor) -> Tensor:
        std = (levels.alpha.double() ** 2 * variance + levels.sigma.double() ** 2).sqrt()
        return mean + math.sqrt(variance) * (sample - levels.alpha * mean) / std

    return formula
