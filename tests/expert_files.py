"""Expert recipes and files for the tiny pipelines, and the same pictures made by hand.

By hand means: the stock pipeline without any LoRA, and before each network call the weights set to
base + scale * alpha / rank * up @ down of that step's expert. No code of the product is in that
arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fewstep.adapters import save_adapter
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Expert, FewStepRecipe
from tests.tiny_pipelines import TinyFamily

HIGH, LOW = "high_noise", "low_noise"
TOLERANCE = 1e-4
"""float32: base + delta in another order of sums, through four steps."""
Deltas = Mapping[str, Mapping[str, Tensor]]
"""Component -> weight name -> what is added to it."""


def expert_recipe(
    family: TinyFamily, *, own_networks: bool = False, num_high: int = 2, **changes: Any
) -> FewStepRecipe:
    """A four-step recipe whose first steps are one expert's and the others another's."""
    recipe = family.recipe(**changes)
    grid = recipe.grids[0]
    boundary = (grid.sigmas[num_high - 1] + grid.sigmas[num_high]) / 2.0
    places = ("transformer", "transformer_2") if own_networks else (None, None)
    experts = (
        Expert(adapter=HIGH, sigma_high=1.0, sigma_low=boundary, component=places[0]),
        Expert(adapter=LOW, sigma_high=boundary, sigma_low=0.0, component=places[1]),
    )
    chosen = tuple(0 if i < num_high else 1 for i in range(grid.num_steps))
    return replace(recipe, experts=experts, grids=(replace(grid, experts=chosen),))


def expert_file(
    family: TinyFamily,
    path: Path,
    *,
    seed: int,
    recipe: FewStepRecipe | None = None,
    rank: int = 2,
    alpha: float | None = None,
    layers: tuple[str, ...] = ("to_q", "to_v"),
    phase: str | None = None,
    component: str | None = None,
    strength: float = 0.5,
) -> Path:
    """An adapter on some layers of a family's first denoiser."""
    model = family.build().components[family.denoisers[0]]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(layers):
            tensors[f"{name}.lora_A.weight"] = torch.randn(
                rank, module.in_features, generator=generator
            )
            tensors[f"{name}.lora_B.weight"] = strength * torch.randn(
                module.out_features, rank, generator=generator
            )
    return save_adapter(
        path,
        tensors,
        recipe=recipe or family.recipe(),
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        title="expert",
        component=component or ("unet" if family.denoisers[0] == "unet" else "transformer"),  # pyright: ignore[reportArgumentType]
        metadata={} if phase is None else {"fewstep.phase": phase},
    )


def expert_folder(
    family: TinyFamily, folder: Path, *, own_networks: bool = False, **changes: Any
) -> tuple[Path, FewStepRecipe]:
    """A folder with a file per expert: other ranks, alphas and layers."""
    recipe = expert_recipe(family, own_networks=own_networks, **changes)
    expert_file(
        family, folder / "high_noise_model.safetensors", seed=1, recipe=recipe, rank=2, alpha=1.0
    )
    expert_file(
        family,
        folder / "low_noise_model.safetensors",
        seed=2,
        recipe=recipe,
        rank=3,
        layers=("to_q", "to_k"),
    )
    return folder, recipe


def deltas_of(file: Path, component: str, scale: float = 1.0) -> Deltas:
    """What a file adds to each weight (alpha is baked in by the writer)."""
    tensors = safetensors.torch.load_file(file)
    found: dict[str, Tensor] = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            module = name.partition(".")[2].removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = scale * up @ down
    return {component: found}


def draw_by_hand(
    family: TinyFamily,
    recipe: FewStepRecipe,
    per_step: Sequence[Sequence[Deltas]],
    **arguments: Any,
) -> Tensor:
    """The picture when step i runs with the weights plus all of `per_step[i]`."""
    stock = family.build()
    plain = replace(
        recipe, experts=(), grids=tuple(replace(grid, experts=()) for grid in recipe.grids)
    )
    pipe = FewStepPipeline.wrap(stock, recipe=plain)
    base = {
        name: {k: v.clone() for k, v in pipe.components[name].state_dict().items()}
        for name in family.denoisers
    }
    done = [0]

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            weights = dict(base[name])
            for deltas in per_step[done[0]]:
                for key, delta in deltas.get(name, {}).items():
                    weights[key] = weights[key] + delta
            module.load_state_dict(weights)
            done[0] += 1

        return hook

    for name in family.denoisers:
        pipe.components[name].register_forward_pre_hook(hook_of(name))
    picture = draw(pipe, family, **arguments)
    assert done[0] == len(per_step)
    return picture


def draw(pipe: Any, family: TinyFamily, **arguments: Any) -> Tensor:
    """One picture of seed 0."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(**family.arguments(1), seed=0, **arguments)[0]


def assert_same_picture(actual: Tensor, expected: Tensor) -> None:
    """Equal up to `TOLERANCE`, relative and absolute."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
