"""Files of the kinds that are no plain LoRA, for tiny pipelines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapters import (
    RouteWeights,
    save_lorad_adapter,
    save_routed_adapter,
    save_two_time_adapter,
)
from fewstep.heads.embedder import timestep_embedder
from fewstep.heads.two_time import TwoTimeHead
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe, Lora, Route, Sampler
from tests.tiny_pipelines import TinyFamily

LAYERS = ("to_q", "to_v")
ROUTES = ("round", "straight")


def component_of(family: TinyFamily) -> Any:
    return "unet" if family.denoisers[0] == "unet" else "transformer"


def denoiser(pipe: Any, family: TinyFamily) -> nn.Module:
    return pipe.components[family.denoisers[0]]


def lora_tensors(
    family: TinyFamily, seed: int, *, rank: int = 2, layers: tuple[str, ...] = LAYERS
) -> dict[str, Tensor]:
    """A LoRA, names as the writers take them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in denoiser(family.build(), family).named_modules():
        if name.endswith(layers) and isinstance(layer, nn.Linear):
            a = torch.randn(rank, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, rank, generator=generator)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": 0.5 * b}
    return tensors


def lorad_tensors(
    family: TinyFamily, seed: int, *, rank: int = 2, layers: tuple[str, ...] = LAYERS
) -> dict[str, Tensor]:
    """Rotations, names as the writer takes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in denoiser(family.build(), family).named_modules():
        if name.endswith(layers) and isinstance(layer, nn.Linear):
            a = torch.randn(layer.out_features, rank, generator=generator)
            b = torch.randn(rank, layer.in_features // 2, generator=generator)
            tensors |= {f"{name}.lorad_A.weight": a, f"{name}.lorad_B.weight": b}
    return tensors


def lorad_file(
    family: TinyFamily,
    path: Path,
    *,
    seed: int = 1,
    recipe: FewStepRecipe | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """An adapter that rotates every to_q and to_v."""
    return save_lorad_adapter(
        path,
        lorad_tensors(family, seed) if tensors is None else tensors,
        recipe=recipe or family.recipe(),
        title="rotations",
        component=component_of(family),
        **options,
    )


def lorad_recipe(family: TinyFamily, **changes: Any) -> FewStepRecipe:
    return family.recipe(lora=Lora(alpha="baked", kind="lorad"), **changes)


def rotated_by_hand(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Column pairs turned one number at a time; no code of the product."""
    angles = (a.double() @ b.double()).tolist()
    turned = weight.double().clone()
    for row, of_row in enumerate(angles):
        for pair, angle in enumerate(of_row):
            matrix = torch.linalg.matrix_exp(
                torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
            )
            at = slice(2 * pair, 2 * pair + 2)
            turned[row, at] = matrix @ weight[row, at].double()
    return turned.to(weight.dtype)


def rotate_by_hand(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put rotations into a model's weights."""
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lorad_A.weight"):
                module = name.removesuffix(".lorad_A.weight")
                weight = model.get_submodule(module).get_parameter("weight")
                b = tensors[f"{module}.lorad_B.weight"]
                weight.copy_(rotated_by_hand(weight, a, b))


def add_lora_by_hand(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a LoRA into a model's weights."""
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                up = tensors[f"{module}.lora_B.weight"]
                model.get_submodule(module).get_parameter("weight").add_(up @ a)


def two_time_recipe(family: TinyFamily, **changes: Any) -> FewStepRecipe:
    return family.recipe(sampler=Sampler(kind="flow_map"), **changes)


def trained_head(family: TinyFamily, seed: int = 5, strength: float = 1.0) -> TwoTimeHead:
    """A head whose share is not nothing; strength 0 is a fresh one."""
    width = timestep_embedder(denoiser(family.build(), family)).width
    generator = torch.Generator().manual_seed(seed)
    head = TwoTimeHead(width, 12, 32, generator)
    with torch.no_grad():
        for parameter in head.linear_2.parameters():
            parameter.normal_(0.0, strength, generator=generator) if strength else None
    return head


def two_time_file(
    family: TinyFamily,
    path: Path,
    *,
    head: TwoTimeHead | None = None,
    recipe: FewStepRecipe | None = None,
    **options: Any,
) -> Path:
    """A LoRA with a head."""
    return save_two_time_adapter(
        path,
        lora_tensors(family, 1),
        (head or trained_head(family)).state_dict(),
        recipe=recipe or two_time_recipe(family),
        rank=2,
        alpha=2.0,
        title="flow map",
        component=component_of(family),
        **options,
    )


def routed_recipe(family: TinyFamily, **changes: Any) -> FewStepRecipe:
    return family.recipe(routes=tuple(Route(adapter=name) for name in ROUTES), **changes)


def routed_file(
    family: TinyFamily,
    path: Path,
    centroids: Tensor,
    *,
    recipe: FewStepRecipe | None = None,
    seeds: tuple[int, ...] = (11, 12),
    **options: Any,
) -> Path:
    """An expert per route, with these centroids."""
    routes = {
        name: RouteWeights(lora_tensors(family, seed), centroid)
        for name, seed, centroid in zip(ROUTES, seeds, centroids, strict=True)
    }
    return save_routed_adapter(
        path,
        routes,
        recipe=recipe or routed_recipe(family),
        rank=2,
        alpha=2.0,
        title="routes",
        component=component_of(family),
        **options,
    )


def state_of(pipe: Any, family: TinyFamily) -> dict[str, Tensor]:
    """Copies of the denoiser's weights."""
    return {name: t.clone() for name, t in denoiser(pipe, family).state_dict().items()}


def assert_bits_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def wrapped(family: TinyFamily, **options: Any) -> FewStepPipeline:
    pipe = FewStepPipeline.wrap(family.build(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
