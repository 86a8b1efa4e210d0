"""One adapter file to another: read, re-rank, bake, write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.adapters.base_shapes import DENOISERS, denoiser_shapes
from fewstep.adapters.conversion.baking import baked, scale_baked, with_recipe
from fewstep.adapters.conversion.checkpoints import (
    Difference,
    Weights,
    denoiser_weights,
    difference,
    is_full_checkpoint,
)
from fewstep.adapters.conversion.converted import ConvertedAdapter
from fewstep.adapters.conversion.diffusers_flavour import layer_without_bias
from fewstep.adapters.conversion.file_writing import write_safetensors
from fewstep.adapters.conversion.name_index import component_of
from fewstep.adapters.conversion.name_rules import RULES, UNETS
from fewstep.adapters.conversion.no_base import shapes_of_file
from fewstep.adapters.conversion.parts import split_name
from fewstep.adapters.conversion.policy_kept import take_head
from fewstep.adapters.conversion.ranking import ModuleError, Progress, to_rank, total_error
from fewstep.adapters.conversion.reading import convert_to_diffusers
from fewstep.adapters.conversion.rotated import rotated_deltas
from fewstep.adapters.conversion.writing import Format, in_format
from fewstep.adapters.families import family_of_base, guess_family
from fewstep.adapters.header import AdapterHeader, read_header
from fewstep.adapters.kinds import AdapterKind, adapter_parts
from fewstep.adapters.modules import lora_modules
from fewstep.adapters.opening import open_adapter
from fewstep.errors import AdapterError
from fewstep.model_files import find_adapter
from fewstep.recipe import FewStepRecipe

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
    recipe: FewStepRecipe | None = None,
    is_baked: bool = False,
    is_scale_baked: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter again in another program's names.

    Args:
        source: Adapter file of any naming, rotations (LoRaD), or a full-weight student (file or
            diffusers folder). A policy head goes along in the diffusers format.
        target: The new `*.safetensors`.
        flavour: Whose names.
        base: diffusers folder of the base; needed for full weights and rotations, and the only
            proof of fit.
        family: Base family; None: seen from the base, the recipe or the names.
        rank: Re-rank to this; None: values stay as they are.
        recipe: Written into the file, in place of what it carries.
        is_baked: Multiply alpha / rank into the up matrices, so that readers without alpha agree.
        is_scale_baked: Multiply the recipe's scale into them too, so that strength 1 is right.
        progress: Called with (parts done, parts in all) while re-ranking.

    Raises:
        AdapterError: The file is damaged, does not fit, or cannot be said in these names; or the
            new one has no name to be written under.
    """
    _check_target(source, target)
    if rank is not None and rank < 1:
        raise AdapterError(f"rank is {rank}, wanted at least 1; 16 to 128 is usual")
    left_out: dict[str, float] = {}
    header, weights = _opened(source)
    kind = _convertible_kind(header)
    header, head = take_head(header, flavour)
    if kind == "lorad":
        adapter, shapes = _unrotated(header, base, family, rank, progress)
    elif weights is not None:
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
        _check_is_of_one_network(header)
        family, shapes = _family_and_shapes(header, base, family)
        component = _component(base, family)
        adapter = convert_to_diffusers(header, shapes, component=component, family=family)
    errors: tuple[ModuleError, ...] = ()
    if rank is not None:
        adapter, errors = to_rank(adapter, rank, progress)
    if recipe is not None:
        adapter = with_recipe(adapter, recipe)
    if is_scale_baked:
        adapter = scale_baked(adapter)
    if is_baked:
        adapter = baked(adapter)
    file = in_format(adapter, shapes, flavour)
    head.put_back(file)
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


def _check_target(source: Path, target: Path) -> None:
    """Before any work: the original must outlive it."""
    if target.suffix != ".safetensors":
        raise AdapterError(
            f"{target}: adapters are safetensors files; end the name in .safetensors"
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise AdapterError(f"{target}: would overwrite the adapter it is made from; name another")


def _check_is_of_one_network(header: AdapterHeader) -> None:
    components = sorted({component_of(split_name(name)[0]) or "" for name in header.tensors} - {""})
    if len(components) > 1:
        raise AdapterError(
            f"{header.path}: has layers of {' and '.join(components)}, two networks, and a "
            "converted file is for one; save each one's tensors as a file of its own"
        )


def _opened(source: Path) -> tuple[AdapterHeader, Weights | None]:
    """The file; with the weights of the model if it is one and not an adapter."""
    if source.is_dir():
        component, weights = denoiser_weights(source)
        if component or any(split_name(name)[1] == "unknown" for name in weights.shapes):
            return AdapterHeader(source, 0, {}, {}), weights
        source = find_adapter(source).path  # a folder with a LoRA, as on the hub
    header = open_adapter(source)
    is_full = is_full_checkpoint(adapter_parts(header).lora)  # a head is no LoRA either
    return header, Weights([header]) if is_full else None


def _convertible_kind(header: AdapterHeader) -> AdapterKind:
    parts = adapter_parts(header)
    if parts.kind in ("two_time", "routes"):
        raise AdapterError(
            f"{header.path}: is {parts.kind_text}, which no other program can apply, so there are "
            "no names to write; sample it with FewStepPipeline"
        )
    return parts.kind


def _unrotated(
    header: AdapterHeader,
    base: Path | None,
    family: str | None,
    rank: int | None,
    progress: Progress | None,
) -> tuple[ConvertedAdapter, Mapping[str, Shape]]:
    if base is None or rank is None:
        raise AdapterError(
            f"{header.path}: holds rotations (LoRaD), which no other program can apply; give "
            "--base, the folder of the model it is for, and --rank, to make a LoRA of them"
        )
    _check_is_of_one_network(header)
    component, weights = denoiser_weights(base)
    family = family or family_of_base(weights.shapes)
    component = component or _component(None, family)
    adapter = rotated_deltas(header, weights, component=component, family=family, progress=progress)
    return adapter, weights.shapes


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


def _family_and_shapes(
    header: AdapterHeader, base: Path | None, family: str | None
) -> tuple[str | None, Mapping[str, Shape]]:
    """What the adapter is for; without a base, the shapes that its own layers ask for."""
    if base is None:
        family = family or _guessed(header)
        return family, shapes_of_file(header, family)
    if base.is_file():
        shapes = {name: info.shape for name, info in read_header(base).tensors.items()}
    else:
        shapes = denoiser_shapes(base)
    return family or family_of_base(shapes), shapes


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
