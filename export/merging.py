"""A pipeline whose adapters are merged into its weights, checked against the unmerged one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import ExportError
from fewstep.export.families.family import ExportFamily
from fewstep.export.families.registry import family_of
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.few_step_class import stock_class
from fewstep.recipe import FewStepRecipe

TOLERANCE = 1e-4
"""Relative: merging adds float32 rounding only, two orders below this."""


@dataclass(frozen=True, slots=True)
class MergedPipeline:
    """What is exported.

    Attributes:
        pipe: The stock pipeline, adapters merged.
        recipe: How it is sampled.
        family: How its parts are exported.
        merge_error: Largest difference between merged and unmerged denoiser, relative; 0 without
            an adapter.
    """

    pipe: Any
    recipe: FewStepRecipe
    family: ExportFamily
    merge_error: float


def load_merged(
    base: str | Path, adapter: str | Path | None, recipe: str | Path | None
) -> MergedPipeline:
    """Load a base, merge an adapter into it, and see that nothing was lost.

    Raises:
        ExportError: The family is not exported, experts share one network, or the merged network
            is not the unmerged one.
        FewstepError: The base, adapter or recipe cannot be loaded; see FewStepPipeline.
    """
    pipe: Any = FewStepPipeline.from_pretrained(base, adapter=adapter, recipe=recipe)
    found = pipe.recipe
    family = family_of(stock_class(pipe).__name__)
    _check_is_plain(found)
    error = 0.0
    if pipe.adapters:
        unmerged = _answer(pipe, family)
        pipe.fuse()
        error = _relative(_answer(pipe, family), unmerged)
        if error > TOLERANCE:
            raise ExportError(
                f"the merged network differs from base and adapter by {error:.1e} relative, more "
                f"than {TOLERANCE:g}; report this adapter, it is not exported"
            )
    pipe.unwrap()
    return MergedPipeline(pipe, found, family, error)


def _check_is_plain(recipe: FewStepRecipe) -> None:
    if recipe.sampler.kind != "step":
        raise ExportError(
            f"this recipe's sampler is {recipe.sampler.kind!r}; only plain steps are exported"
        )
    if recipe.routes:
        raise ExportError("this adapter picks experts by prompt, which is not exported")
    if recipe.experts and any(expert.component is None for expert in recipe.experts):
        raise ExportError(
            "this adapter's experts share one network, which is not exported yet; use the pipeline"
        )
    if any(grid.sizes for grid in recipe.grids):
        raise ExportError("this recipe's samples grow from step to step, which is not exported")


def _answer(pipe: Any, family: ExportFamily) -> Tensor:
    """The denoiser's output for a fixed input, the adapter in effect."""
    switch = pipe._fewstep.experts
    if switch is not None:
        switch.prepare(pipe)
    part = next(part for part in family.parts(pipe) if part.name == family.denoiser)
    with torch.no_grad():
        found = part.module.eval()(*part.example().values())
    return found[0] if isinstance(found, tuple) else found


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
