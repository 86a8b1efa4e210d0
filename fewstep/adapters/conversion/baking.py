"""Alpha, or the recipe's scale, multiplied into the matrices, for readers that know neither."""

from dataclasses import replace
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.converted import UP, ConvertedAdapter
from fewstep.adapters.header import AdapterHeader
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY, FewStepRecipe, Lora

if TYPE_CHECKING:
    import torch


def baked(adapter: ConvertedAdapter) -> ConvertedAdapter:
    """The same adapter with alpha / rank multiplied into the up matrices; the recipe says so."""
    tensors = dict(adapter.tensors)
    for module, rank in adapter.ranks.items():
        _bake(tensors, module, adapter.alphas[module], rank)
    text = {component: dict(found) for component, found in adapter.text_tensors.items()}
    text_ranks: dict[str, dict[str, float]] = {}
    for component, alphas in adapter.text_alphas.items():
        for module, alpha in alphas.items():
            rank = text[component][module + UP].shape[1]
            _bake(text[component], module, alpha, rank)
            text_ranks.setdefault(component, {})[module] = float(rank)
    alphas = {module: float(rank) for module, rank in adapter.ranks.items()}
    return replace(
        adapter,
        header=_saying_baked(adapter.header),
        tensors=tensors,
        alphas=alphas,
        text_tensors=text,
        text_alphas=text_ranks,
        coverage=replace(adapter.coverage, alphas=alphas),
    )


def _bake(tensors: "dict[str, torch.Tensor]", module: str, alpha: float, rank: int) -> None:
    if alpha != rank:
        up = tensors[module + UP]
        tensors[module + UP] = (up.float() * (alpha / rank)).to(up.dtype)


def scale_baked(adapter: ConvertedAdapter) -> ConvertedAdapter:
    """The same adapter with its recipe's scale multiplied in, so that strength 1 is right.

    Raises:
        AdapterError: The file carries no recipe, so its scale is not known.
    """
    recipe = adapter.header.recipe()
    if recipe is None:
        raise AdapterError(
            f"{adapter.header.path}: carries no recipe, so the scale to bake is not known; give "
            "the recipe too (--recipe zoo:NAME or a file)"
        )
    scale = recipe.lora.scale
    return replace(
        adapter,
        header=_with_lora(adapter.header, Lora(scale=1.0, alpha=recipe.lora.alpha)),
        tensors=_scaled(adapter.tensors, scale, UP),
        text_tensors={part: _scaled(ups, scale, UP) for part, ups in adapter.text_tensors.items()},
        extras=_scaled(adapter.extras, scale, ""),
    )


def with_recipe(adapter: ConvertedAdapter, recipe: FewStepRecipe) -> ConvertedAdapter:
    """The same adapter carrying this recipe."""
    metadata = {**adapter.header.metadata, METADATA_KEY: recipe.to_json()}
    return replace(adapter, header=replace(adapter.header, metadata=metadata))


def _scaled(
    tensors: "dict[str, torch.Tensor]", scale: float, ending: str
) -> "dict[str, torch.Tensor]":
    return {
        name: (scale * values.float()).to(values.dtype) if name.endswith(ending) else values
        for name, values in tensors.items()
    }


def _saying_baked(header: AdapterHeader) -> AdapterHeader:
    recipe = header.recipe()
    if recipe is None:
        return header
    return _with_lora(header, Lora(scale=recipe.lora.scale, alpha="baked"))


def _with_lora(header: AdapterHeader, lora: Lora) -> AdapterHeader:
    recipe = header.recipe()
    assert recipe is not None  # both callers looked
    text = replace(recipe, lora=lora).to_json()
    return replace(header, metadata={**header.metadata, METADATA_KEY: text})
