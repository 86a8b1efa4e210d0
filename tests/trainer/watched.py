"""The exact teacher with a layer to look at, and real networks with several roles on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.discriminators import Heads
from fewstep.trainer.components.features import FeatureSource, shapes_of
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.data.latent_book import LatentBook, LatentBucket
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.lora import LoraUpdate
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import SingleRoute
from tests.trainer.analytic import SHAPE, ExactBackbone, ExactDenoiser

NUM_FEATURES = 32


def place_student(setting: Setting, up: float, down: tuple[float, ...]) -> None:
    """Set the rank-1 student of the exact teacher: x0 = exact + up * <down, features>.

    Of the features, the first is the exact x0, the second the sample, the fifth 1, the last sigma.
    """
    layer = setting.backbone.denoiser.get_submodule("head.updates.student")
    assert isinstance(layer, LoraUpdate)
    with torch.no_grad():
        layer.down.copy_(torch.tensor([down]))
        layer.up.fill_(up)


class Seen(nn.Module):
    """Fixed bounded features of a sample's values and its noise level, one token per value."""

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.register_buffer("weight", torch.randn(2, NUM_FEATURES, generator=generator))
        self.register_buffer("bias", torch.randn(NUM_FEATURES, generator=generator))

    def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
        values = torch.stack([sample.flatten(1), sigma.expand_as(sample).flatten(1)], dim=-1)
        return torch.tanh(values @ self.weight + self.bias)


class WatchedDenoiser(ExactDenoiser):
    """The exact denoiser; its input passes a layer that a discriminator can read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.seen(sample, (timestep / 1000.0).reshape(-1, 1, 1, 1))
        return super().forward(sample, timestep)


class WatchedBackbone(ExactBackbone):
    """The exact teacher with `seen` as its feature layer, for latents of any shape."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.exact = WatchedDenoiser()
        self.shape = shape

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ("seen",)

    def latent_shape(
        self, height_px: int = 0, width_px: int = 0, num_frames: int = 0
    ) -> tuple[int, ...]:
        return self.shape


@dataclass(frozen=True)
class Watched:
    """A real network with a student, a critic and heads, none of them at its start value."""

    setting: Setting
    shape: tuple[int, ...]

    def context(
        self, *, with_grad: bool, count: int = 3, progress: float = 0.0, step: int = 0
    ) -> StepContext:
        device = torch.device("cpu")
        draws = Draws(seed=0, step=step, update=0, samples=range(count), device=device)
        return StepContext(
            self.setting,
            draws,
            progress=progress,
            expert=None,
            with_grad=with_grad,
            uses_data=True,
        )

    def gradients(self) -> dict[str, Tensor]:
        """Of student, critic and heads, flat; zeros where none arrived."""
        cast = self.setting.cast
        groups = {role.name: cast.parameters(role) for role in (Role.STUDENT, Role.CRITIC)}
        groups["heads"] = list(cast.modules["discriminator"].parameters())
        found: dict[str, Tensor] = {}
        for name, parameters in groups.items():
            parts = [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in parameters
            ]
            found[name] = torch.cat(parts)
            for parameter in parameters:
                parameter.grad = None
        return found


def staged(
    backbone: Backbone,
    conditions: Condition,
    null_condition: Condition,
    source: FeatureSource,
    shape: tuple[int, ...],
) -> Watched:
    """Roles with random updates on a real network, random data, random heads."""
    cast = Cast(backbone.denoiser, backbone.own_networks)
    generator = torch.Generator().manual_seed(1)
    for role in (Role.STUDENT, Role.CRITIC):
        cast.add(role, LoraPolicy(backbone.lora_targets, 2, 2.0), generator)
        for parameter in cast.parameters(role):
            parameter.data.normal_(generator=generator).mul_(0.2)
    heads = Heads(shapes_of(source, backbone, null_condition), width=8)
    for parameter in heads.parameters():
        parameter.data.normal_(generator=generator).mul_(0.3)
    cast.modules["discriminator"] = heads
    count = len(conditions)
    book = PromptBook(("",) * count, conditions, null_condition)
    x0 = torch.randn(8, *shape, generator=generator)
    latents = LatentBook((LatentBucket((x0,), torch.arange(8) % count),))
    setting = Setting(backbone, cast, book, latents, (shape,), SingleRoute())
    return Watched(setting, shape)
