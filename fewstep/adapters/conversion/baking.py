"""Alpha multiplied into the matrices, for readers that know no alpha."""

from dataclasses import replace
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.converted import UP, ConvertedAdapter
from fewstep.adapters.header import AdapterHeader
from fewstep.recipe import METADATA_KEY, Lora

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


def _saying_baked(header: AdapterHeader) -> AdapterHeader:
    recipe = header.recipe()
    if recipe is None:
        return header
    lora = Lora(scale=recipe.lora.scale, alpha="baked")
    text = replace(recipe, lora=lora).to_json()
    return replace(header, metadata={**header.metadata, METADATA_KEY: text})
