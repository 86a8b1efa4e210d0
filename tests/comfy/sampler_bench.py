"""A tiny MODEL with its guider, noise and sampler: what tests of samplers and their nodes share."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.recipe import FewStepRecipe, Sampler
from tests.comfy.harness import Comfy
from tests.comfy.references import (
    PROMPT_SEED,
    network_scale,
)
from tests.comfy.testkit import conditioning
from tests.comfy.tiny_models import SD3, SD15, TinyModel

SEED = 5
CLOSE = 1e-5
BOTH = pytest.mark.parametrize("model", [SD3, SD15], ids=["sd3", "sd15"])
GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])


@dataclasses.dataclass(frozen=True)
class Bench:
    """A tiny MODEL in ComfyUI, and what is sampled with it."""

    model: TinyModel
    patcher: Any

    @property
    def prompt(self) -> list[Any]:
        made = conditioning(PROMPT_SEED, **self.model.conditioning)
        extra: dict[str, Any] = {"attention_mask": torch.ones(made["cond"].shape[:2])}
        if "pooled" in made:
            extra["pooled_output"] = made["pooled"]
        return [[made["cond"], extra]]

    def guider(self) -> Any:
        import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

        guider = samplers.CFGGuider(self.patcher)
        guider.set_conds(self.prompt, self.prompt)
        guider.set_cfg(1.0)
        return guider

    def empty(self, batch: int = 1) -> Tensor:
        return torch.zeros(batch, *self.model.latent_shape)

    def noise(self, batch: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(self.empty(batch).shape, generator=generator)

    def build(self, recipe: FewStepRecipe, **options: Any) -> tuple[Any, Tensor]:
        from fewstep.comfy_nodes.few_step_sampler import build_sampling
        from fewstep.comfy_nodes.sockets import NamedRecipe

        return build_sampling(self.patcher, NamedRecipe(recipe, "test"), **options)

    def run(
        self,
        sampler: Any,
        sigmas: Tensor,
        *,
        image: Tensor | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        seed: int = SEED,
    ) -> Tensor:
        """Latents in the network's scale; `image` is a LATENT's."""
        start = self.empty() if image is None else image
        made = self.guider().sample(
            self.noise(len(start)) if noise is None else noise,
            start,
            sampler,
            sigmas,
            denoise_mask=mask,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return network_scale(self.model, made)

    def sample(self, recipe: FewStepRecipe, **options: Any) -> Tensor:
        return self.run(*self.build(recipe), **options)


@cache
def loaded(comfy_folder: str, model: TinyModel) -> Any:
    import comfy.sd as sd  # pyright: ignore[reportMissingImports]

    return sd.load_diffusion_model(f"{comfy_folder}/diffusion_models/{model.file}")


def bench(comfy: Comfy, model: TinyModel) -> Bench:
    model.save(comfy.folder)
    return Bench(model, loaded(str(comfy.folder), model))


def recipe_of(model: TinyModel, gamma: float = 0.0, **sampler: Any) -> FewStepRecipe:
    recipe = model.recipe(model.family)
    return dataclasses.replace(recipe, sampler=Sampler(stochasticity=gamma, **sampler))


def with_grid(recipe: FewStepRecipe, **changes: Any) -> FewStepRecipe:
    return dataclasses.replace(recipe, grids=(dataclasses.replace(recipe.grids[0], **changes),))
