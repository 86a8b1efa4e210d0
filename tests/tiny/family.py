"""What a test needs to know of one family of pipelines, and how it watches the denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.recipe import FewStepRecipe
from tests.tiny.recipes import flow_recipe, vp_recipe


@dataclass(frozen=True)
class TinyFamily:
    """One family.

    Attributes:
        name: The family as recipes spell it, or a variant of it.
        family: The family as recipes spell it.
        build: Makes the stock pipeline, seeded.
        arguments: Batch size -> call arguments without steps, guidance and seed.
        latent_shape: One image's latents before any packing.
        denoisers: Names of the denoiser components.
        clock: The timestep of the grid, from what the denoiser was told.
        is_vp: Whether it is of the VP kind; else flow.
    """

    name: str
    family: str
    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[int], dict[str, Any]]
    latent_shape: tuple[int, ...]
    denoisers: tuple[str, ...] = ("transformer",)
    clock: Callable[[float], float] = lambda told: told
    is_vp: bool = False

    def recipe(self, **changes: Any) -> FewStepRecipe:
        """A four-step recipe for it."""
        make = vp_recipe if self.is_vp else flow_recipe
        return make(self.family, **changes)


def embeds(batch: int, *shape: int) -> Tensor:
    """Prompt embeddings: image i of any batch has the same ones."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(90 + i)) for i in range(99)]
    return torch.stack(rows[:batch])


def record_denoiser(pipe: Any, family: TinyFamily) -> list[tuple[str, Tensor, Any]]:
    """From now on, (component, timesteps, sample) of every denoiser call, in order."""
    calls: list[tuple[str, Tensor, Any]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            calls.append((name, torch.as_tensor(timestep).reshape(-1), sample))

        return hook

    for name in family.denoisers:
        pipe.components[name].register_forward_pre_hook(hook_of(name), with_kwargs=True)
    return calls


def seen_timesteps(calls: Sequence[tuple[str, Tensor, Any]], family: TinyFamily) -> list[float]:
    """The grid's timesteps as the denoiser was told them."""
    return [family.clock(float(timestep[0])) for _, timestep, _ in calls]
