"""A pipeline whose adapters are merged into its weights, checked against the unmerged one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import ExportError
from fewstep.export.experts import SharedExpert, merged_expert, shared_experts
from fewstep.export.families.family import ExportFamily
from fewstep.export.families.registry import family_of
from fewstep.export.part import Part
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.few_step_class import stock_class
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.manifest import Precision

TOLERANCE = 1e-4
"""Relative: merging adds float32 rounding only, two orders below this."""


@dataclass(frozen=True, slots=True)
class MergedPipeline:
    """What is exported.

    Attributes:
        pipe: The stock pipeline, adapters merged; those of `experts` are not, `parts` merges them.
        recipe: How it is sampled.
        family: How its parts are exported.
        merge_error: Largest difference between merged and unmerged denoiser, relative; 0 without
            an adapter.
        precision: Its networks were converted to; one that experts share stays float32, `parts`
            converts it.
        experts: Those that share one network; empty where each has its own, and without experts.
    """

    pipe: Any
    recipe: FewStepRecipe
    family: ExportFamily
    merge_error: float
    precision: Precision = "fp32"
    experts: tuple[SharedExpert, ...] = ()

    def parts(self) -> Iterator[Part]:
        """Every component as it is exported, one at a time.

        An expert's weights are in its network until the next part is asked for.
        """
        for part in self.family.parts(self.pipe):
            if not self.experts or part.name != self.family.denoiser:
                yield part
                continue
            for expert in self.experts:
                with merged_expert(
                    self.pipe, expert, self.recipe, network=part.name, dtype=self.dtype
                ):
                    yield replace(part, name=expert.graph)

    @property
    def dtype(self) -> torch.dtype:
        """Of a network that experts share, once it is merged."""
        return torch.float16 if self.precision == "fp16" else torch.float32

    @property
    def expert_graphs(self) -> tuple[str, ...]:
        """Graph of each of the recipe's experts."""
        if self.experts:
            return tuple(expert.graph for expert in self.experts)
        return tuple(e.component or self.family.denoiser for e in self.recipe.experts)


def load_merged(
    base: str | Path,
    adapter: str | Path | None,
    recipe: str | Path | None,
    precision: Precision = "fp32",
) -> MergedPipeline:
    """Load a base, merge an adapter into it, and see that nothing was lost.

    Args:
        base: Folder of a diffusers pipeline, or its hub name.
        adapter: A LoRA, or a folder with one per expert.
        recipe: In place of the adapter's.
        precision: fp32 or fp16; what is merged in float32 is converted afterwards.

    Raises:
        ExportError: The family is not exported, or a merged network is not the unmerged one.
        FewstepError: The base, adapter or recipe cannot be loaded; see FewStepPipeline.
    """
    pipe: Any = FewStepPipeline.from_pretrained(base, adapter=adapter, recipe=recipe)
    found = pipe.recipe
    family = family_of(stock_class(pipe).__name__)
    _check_is_plain(found)
    experts = shared_experts(pipe, family)
    unmerged = _unmerged_answers(pipe, family, experts)
    if unmerged and not experts:
        pipe.fuse()
    pipe.unwrap()
    merged = MergedPipeline(pipe, found, family, 0.0, experts=experts)
    error = _merge_error(merged, unmerged)
    set_precision(merged, precision)
    return replace(merged, merge_error=error, precision=precision)


def set_precision(merged: MergedPipeline, precision: Precision) -> None:
    """Convert the networks in place, but for one that experts share.

    An autoencoder whose configuration says that it overflows in half precision stays in float32.

    Raises:
        ExportError: The precision is not one that torch's modules are traced in.
    """
    if precision == "fp32":
        return
    if precision != "fp16":
        raise ExportError(
            f"graphs are traced in fp32 or fp16, not {precision}; quantize afterwards"
        )
    for name, module in merged.pipe.components.items():
        is_shared = bool(merged.experts) and name == merged.family.denoiser
        if isinstance(module, torch.nn.Module) and not is_shared:
            overflows = name == "vae" and getattr(module.config, "force_upcast", False)
            module.to(torch.float32 if overflows else torch.float16)


def _check_is_plain(recipe: FewStepRecipe) -> None:
    if recipe.sampler.kind != "step":
        raise ExportError(
            f"this recipe's sampler is {recipe.sampler.kind!r}; only plain steps are exported"
        )
    if recipe.routes:
        raise ExportError("this adapter picks experts by prompt, which is not exported")
    if any(grid.sizes for grid in recipe.grids):
        raise ExportError("this recipe's samples grow from step to step, which is not exported")


def _unmerged_answers(
    pipe: Any, family: ExportFamily, experts: Sequence[SharedExpert]
) -> dict[str, Tensor]:
    """Each adapted network's output for a fixed input, its adapter in effect, by graph."""
    switch = pipe._fewstep.experts
    if switch is None:
        return {}
    switch.prepare(pipe)
    parts = {part.name: part for part in family.parts(pipe)}
    if not experts:
        return {a.component: _answer(parts[a.component]) for a in pipe.adapters}
    found = {}
    for index, expert in enumerate(experts):
        switch.turn_to(index)
        found[expert.graph] = _answer(parts[family.denoiser])
    return found


def _merge_error(merged: MergedPipeline, unmerged: dict[str, Tensor]) -> float:
    if not unmerged:
        return 0.0
    error = max(
        _relative(_answer(part), unmerged[part.name])
        for part in merged.parts()
        if part.name in unmerged
    )
    if error > TOLERANCE:
        raise ExportError(
            f"the merged network differs from base and adapter by {error:.1e} relative, more "
            f"than {TOLERANCE:g}; report this adapter, it is not exported"
        )
    return error


def _answer(part: Part) -> Tensor:
    with torch.no_grad():
        found = part.module.eval()(*part.example().values())
    return found[0] if isinstance(found, tuple) else found


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
