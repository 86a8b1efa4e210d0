"""What a network saw on the way: outputs of its inner modules, caught by hooks as it runs.

Nothing of a model's forward is written again, so any diffusers network will do; a discriminator, a
patch MMD and feature distillation all read here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.levels import Levels
from fewstep.trainer.roles import Role


@final
class FeatureTap:
    """Catches the outputs of some modules while they run inside its `with` block.

    The hooks are there inside the block only: blocks that gradient checkpointing runs again in the
    backward pass are not caught twice, and what was caught is the tensor of the first pass, whose
    gradient goes through the checkpoint like any other.

    Args:
        network: Any module.
        layers: Paths of the modules, as in `named_modules`.

    Raises:
        ConfigError: The network has no such module.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self._modules = {layer: submodule(network, layer) for layer in layers}
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._catcher(layer)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def features(self) -> tuple[Tensor, ...]:
        """One tensor per layer: images (B, C, h, w) or tokens (B, N, C), in the network's dtype.

        Raises:
            ConfigError: A layer did not run.
        """
        missed = [layer for layer in self._modules if layer not in self._caught]
        if missed:
            raise ConfigError(
                f"layer {missed[0]} took no part in the network's call; name a layer that every "
                "call runs through"
            )
        return tuple(self._caught[layer] for layer in self._modules)

    def _catcher(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            self._caught[layer] = last_tensor(output)

        return catch


def submodule(network: nn.Module, path: str) -> nn.Module:
    """A module by its path.

    Raises:
        ConfigError: There is none.
    """
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"{type(network).__name__} has no module {path!r}; see model.named_modules()"
        ) from error


def last_tensor(output: Any) -> Tensor:
    """A module's output, or the last tensor of a tuple.

    Transformer blocks of two streams give (text, image), UNet blocks (sample, its skips up to the
    sample): the last one is the image's in both.
    """
    if isinstance(output, Tensor):
        return output
    assert isinstance(output, tuple | list)
    for part in reversed(output):
        if isinstance(part, Tensor | tuple | list):
            return last_tensor(part)
    raise AssertionError("a module that gives no tensor")


@dataclass(frozen=True, slots=True)
class Tapped:
    """A call whose inside was watched.

    Attributes:
        x0: Its prediction, shape (B, ...), float32.
        features: One per layer, float32.
    """

    x0: Tensor
    features: tuple[Tensor, ...]


def tapped(
    backbone: Backbone,
    role: Role,
    sample: Tensor,
    levels: Levels,
    condition: Condition,
    layers: Sequence[str],
) -> Tapped:
    """One call of a role's network, with the features of some of its layers.

    Raises:
        ConfigError: A layer does not exist, did not run, or saw a part of the batch only (two
            networks that share the clock).
    """
    with FeatureTap(backbone.network(role), layers) as tap:
        x0 = backbone.x0(role, sample, levels, condition)
    for layer, feature in zip(layers, tap.features, strict=True):
        if len(feature) != len(sample):
            raise ConfigError(
                f"layer {layer} saw {len(feature)} of {len(sample)} samples; keep the noise levels "
                "inside the interval of that layer's network"
            )
    return Tapped(x0, tuple(feature.float() for feature in tap.features))


def as_tokens(feature: Tensor) -> Tensor:
    """Features as tokens (B, N, C): images are read row by row."""
    return feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class FeatureShape:
    """What a head must take.

    Attributes:
        channels: Width of a token, or channels of an image.
        is_tokens: (B, N, C) rather than (B, C, h, w).
    """

    channels: int
    is_tokens: bool

    @staticmethod
    def of(feature: Tensor) -> "FeatureShape":
        """The shape of a feature.

        Raises:
            ConfigError: It is neither tokens nor an image.
        """
        if feature.ndim not in (3, 4):
            raise ConfigError(
                f"a layer gives features of shape {tuple(feature.shape)}; choose one that gives "
                "tokens (B, N, C) or images (B, C, h, w)"
            )
        is_tokens = feature.ndim == 3
        return FeatureShape(feature.shape[-1 if is_tokens else 1], is_tokens)


class FeatureSource(ABC):
    """Interface: turns noisy samples into features, differentiable in the sample."""

    @abstractmethod
    def features(
        self, backbone: Backbone, sample: Tensor, levels: Levels, condition: Condition
    ) -> tuple[Tensor, ...]:
        """Features of a batch, float32, each (B, N, C) or (B, C, h, w)."""


@dataclass(frozen=True, slots=True)
class NetworkFeatures(FeatureSource):
    """Layers of a role's diffusion network: the critic's (DMD2) or the frozen teacher's (LADD).

    Attributes:
        layers: Module paths.
        role: Whose network.
    """

    layers: tuple[str, ...]
    role: Role = Role.CRITIC

    def features(
        self, backbone: Backbone, sample: Tensor, levels: Levels, condition: Condition
    ) -> tuple[Tensor, ...]:
        return tapped(backbone, self.role, sample, levels, condition, self.layers).features


@dataclass(frozen=True, slots=True)
class SampleFeatures(FeatureSource):
    """The latents themselves; of use at one noise level, such as clean data."""

    def features(
        self, backbone: Backbone, sample: Tensor, levels: Levels, condition: Condition
    ) -> tuple[Tensor, ...]:
        return (sample.float(),)


@dataclass(frozen=True, slots=True)
class PictureFeatures(FeatureSource):
    """Decoded pictures, seen by any network: a vision foundation model, or nothing (pixels).

    Attributes:
        network: Takes (B, 3, H, W) in 0 to 1 and gives features; it must be frozen by its owner.
    """

    network: Callable[[Tensor], Tensor]

    def features(
        self, backbone: Backbone, sample: Tensor, levels: Levels, condition: Condition
    ) -> tuple[Tensor, ...]:
        return (self.network(backbone.decode_float(sample)).float(),)


@torch.no_grad()
def shapes_of(
    source: FeatureSource, backbone: Backbone, null_condition: Condition
) -> tuple[FeatureShape, ...]:
    """What a source gives, by one call on an empty sample; the budget does not see it."""
    counted = backbone.evaluations.copy()
    sample = torch.zeros(1, *backbone.latent_shape(), device=backbone.device)
    level = backbone.schedule.level(backbone.schedule.uniform_timesteps(1)[0])
    found = source.features(backbone, sample, backbone.level_batch(level, 1), null_condition)
    backbone.evaluations = counted
    return tuple(FeatureShape.of(feature) for feature in found)


def default_layers(backbone: Backbone) -> tuple[str, ...]:
    """Where a discriminator looks by default: the middle one of the family's layers, and the last.

    The last is the middle block of a UNet (DMD2's choice) and the end of a transformer.
    """
    layers = backbone.feature_layers
    return tuple(dict.fromkeys((layers[(len(layers) - 1) // 2], layers[-1])))
