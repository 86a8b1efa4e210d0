"""Experts that share one network: each is merged into it in its turn and becomes its own graph.

The network lies in memory once, and the weights that one expert changes once more. With the expert
taken out it is what it was, to the bit: pointers are exchanged, nothing is subtracted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import ExportError
from fewstep.export.families.family import ExportFamily
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """One expert of a network that has several.

    Attributes:
        graph: Name of its graph and folder.
        name: In the recipe.
        file: Its adapter.
    """

    graph: str
    name: str
    file: Path


def shared_experts(pipe: Any, family: ExportFamily) -> tuple[SharedExpert, ...]:
    """The experts of a wrapped pipeline that share its denoiser, in the recipe's order.

    Returns:
        Empty where there are none, or each has a network of its own.

    Raises:
        ExportError: Some share a network and some do not.
    """
    recipe: FewStepRecipe = pipe.recipe
    networks = [expert.component or family.denoiser for expert in recipe.experts]
    if len(set(networks)) == len(networks):
        return ()
    if set(networks) != {family.denoiser}:
        raise ExportError(
            "some of this recipe's experts share one network of several, which is not exported; "
            "use the pipeline"
        )
    return tuple(
        SharedExpert(family.denoiser + (f"_{number}" if number > 1 else ""), expert.adapter, a.path)
        for number, (expert, a) in enumerate(
            zip(recipe.experts, pipe.adapters, strict=True), start=1
        )
    )


@contextmanager
def merged_expert(
    pipe: Any, expert: SharedExpert, recipe: FewStepRecipe, *, network: str, dtype: torch.dtype
) -> Iterator[None]:
    """One expert merged into the network, then the network as it was.

    Args:
        pipe: A stock pipeline; its network is in float32, where the merging is done.
        expert: Whose adapter.
        recipe: Says its scale.
        network: The component.
        dtype: What the merged network is converted to.
    """
    wrapped = FewStepPipeline.wrap(
        pipe, recipe=_alone(recipe), adapter=expert.file, experts="fused", probe=False
    )
    try:
        with _converted(pipe.components[network], dtype):
            yield
    finally:
        wrapped.unwrap()


def wrapped_experts(
    pipe: Any, experts: tuple[SharedExpert, ...], recipe: FewStepRecipe
) -> FewStepPipeline:
    """The pipeline with all of its experts, unmerged: they take turns as in any FewStepPipeline."""
    files = {expert.name: expert.file for expert in experts}
    return FewStepPipeline.wrap(pipe, recipe=recipe, adapter=files, probe=False)


def _alone(recipe: FewStepRecipe) -> FewStepRecipe:
    """The recipe for one of its experts, who then serves every step."""
    grids = tuple(replace(grid, experts=()) for grid in recipe.grids)
    return replace(recipe, experts=(), grids=grids)


@contextmanager
def _converted(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
