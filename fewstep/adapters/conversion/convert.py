"""One adapter file to another: read, re-rank, bake, write."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.adapters.base_shapes import DENOISERS, denoiser_shapes
from fewstep.adapters.conversion.checkpoints import (
    Difference,
    Weights,
    denoiser_weights,
    difference,
    is_full_checkpoint,
)
from fewstep.adapters.conversion.converted import UP, ConvertedAdapter
from fewstep.adapters.conversion.diffusers_flavour import layer_without_bias
from fewstep.adapters.conversion.file_writing import write_safetensors
from fewstep.adapters.conversion.name_rules import RULES, UNETS
from fewstep.adapters.conversion.no_base import shapes_of_file
from fewstep.adapters.conversion.ranking import ModuleError, Progress, to_rank, total_error
from fewstep.adapters.conversion.reading import convert_to_diffusers
from fewstep.adapters.conversion.writing import Format, in_format
from fewstep.adapters.families import family_of_base, guess_family
from fewstep.adapters.header import AdapterHeader, read_header
from fewstep.adapters.modules import lora_modules
from fewstep.adapters.opening import open_adapter
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY, Lora

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        path: The new file.
        flavour: Whose names it has.
        family: Base family its names were read as.
        modules: LoRA modules of the denoiser.
        text_modules: Of text encoders.
        deltas: Parameters changed by whole deltas.
        is_checked: Whether a base was there to check every name and shape against.
        errors: What re-ranking cost, module by module; () without re-ranking.
        left_out: Parameters of a full-weight student that LoRA cannot change -> relative change.
    """

    path: Path
    flavour: Format
    family: str
    modules: int
    text_modules: int
    deltas: int
    is_checked: bool
    errors: tuple[ModuleError, ...]
    left_out: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "file": str(self.path),
            "format": self.flavour,
            "family": self.family,
            "modules": self.modules,
            "text_encoder_modules": self.text_modules,
            "deltas": self.deltas,
            "checked_against_base": self.is_checked,
            "relative_error": total_error(self.errors),
            "errors": {error.module: error.relative for error in self.errors},
            "left_out": self.left_out,
        }


def convert_file(
    source: Path,
    target: Path,
    flavour: Format,
    *,
    base: Path | None = None,
    family: str | None = None,
    rank: int | None = None,
    is_baked: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter again in another program's names.

    Args:
        source: Adapter file of any naming, or a full-weight student (file or diffusers folder).
        target: The new `*.safetensors`.
        flavour: Whose names.
        base: diffusers folder of the base; needed for full weights, and the only proof of fit.
        family: Base family; None: seen from the base, the recipe or the names.
        rank: Re-rank to this; None: values stay as they are.
        is_baked: Multiply alpha / rank into the up matrices, so that readers without alpha agree.
        progress: Called with (parts done, parts in all) while re-ranking.

    Raises:
        AdapterError: The file is damaged, does not fit, or cannot be said in these names.
    """
    if rank is not None and rank < 1:
        raise AdapterError(f"rank is {rank}, wanted at least 1; 16 to 128 is usual")
    left_out: dict[str, float] = {}
    header, weights = _opened(source)
    if weights is not None:
        found, shapes = _student(header, weights, base, family, rank, progress)
        modules = {
            name.removesuffix(".weight")
            for name in found.adapter.extras
            if name.endswith(".weight")
        }
        if flavour == "diffusers" and layer_without_bias(modules, shapes):
            found = found.without_biases()
        adapter, left_out = found.adapter, found.left_out
    else:
        shapes = _shapes(header, base, family)
        component = _component(base, family or family_of_base(shapes))
        adapter = convert_to_diffusers(header, shapes, component=component, family=family)
    errors: tuple[ModuleError, ...] = ()
    if rank is not None:
        adapter, errors = to_rank(adapter, rank, progress)
    if is_baked:
        adapter = baked(adapter)
    file = in_format(adapter, shapes, flavour)
    write_safetensors(target, file.tensors, file.metadata)
    return Conversion(
        path=target,
        flavour=flavour,
        family=adapter.family or "unknown",
        modules=len(adapter.ranks),
        text_modules=adapter.coverage.text_encoder_modules,
        deltas=len(adapter.extras),
        is_checked=base is not None,
        errors=errors,
        left_out=left_out,
    )


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


def _bake(tensors: dict[str, Any], module: str, alpha: float, rank: int) -> None:
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


def _opened(source: Path) -> tuple[AdapterHeader, Weights | None]:
    """The file; with the weights of the model if it is one and not an adapter."""
    if source.is_dir():
        _, weights = denoiser_weights(source)
        return AdapterHeader(source, 0, {}, {}), weights
    header = open_adapter(source)
    return header, Weights([header]) if is_full_checkpoint(header) else None


def _student(
    header: AdapterHeader,
    weights: Weights,
    base: Path | None,
    family: str | None,
    rank: int | None,
    progress: Progress | None,
) -> tuple[Difference, Mapping[str, Shape]]:
    if base is None or rank is None:
        raise AdapterError(
            f"{header.path}: holds full weights, not an adapter; give --base, the folder it was "
            "trained from, and --rank, to make a LoRA of the difference"
        )
    component, base_weights = denoiser_weights(base)
    family = family or family_of_base(base_weights.shapes)
    found = difference(
        header,
        weights,
        base_weights,
        component=component or _component(None, family),
        family=family,
        progress=progress,
    )
    return found, base_weights.shapes


def _shapes(header: AdapterHeader, base: Path | None, family: str | None) -> Mapping[str, Shape]:
    if base is not None:
        if base.is_file():
            return {name: info.shape for name, info in read_header(base).tensors.items()}
        return denoiser_shapes(base)
    return shapes_of_file(header, family or _guessed(header))


def _guessed(header: AdapterHeader) -> str:
    recipe = header.recipe()
    if recipe is not None and recipe.base.family in RULES:
        return recipe.base.family
    guess = guess_family(lora_modules(header))
    if guess not in RULES:
        raise AdapterError(
            f"{header.path}: the base family cannot be told from its names"
            f"{f' ({guess})' if guess else ''}; give --family, one of {', '.join(RULES)}, or --base"
        )
    return guess


def _component(base: Path | None, family: str | None) -> str:
    if base is not None:
        for name in DENOISERS:
            if (base / name).is_dir():
                return name
    return "unet" if family in UNETS else "transformer"
