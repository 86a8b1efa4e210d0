"""Write the adapter kinds that are no plain LoRA (`kinds`): rotations, two-time heads, routes.

Policy heads are `policy_writer`'s.

As with `save_adapter` every scale is multiplied in, the stored recipe says scale 1, and equal input
gives an equal file. Heads and centroids are float32 whatever the rest is stored in. The metadata
says in a sentence (`fewstep.needs`) who can apply the file.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.file_writing import write_safetensors
from fewstep.adapters.kinds import (
    ANGLES_A,
    ANGLES_B,
    CENTROID,
    NEEDS_KEY,
    TWO_TIME,
    needs_text,
)
from fewstep.adapters.kinds import AdapterKind as Kind
from fewstep.adapters.modelspec import modelspec
from fewstep.adapters.names import parse_name, shown
from fewstep.adapters.writer import (
    Component,
    Dtype,
    checked_extra,
    checked_target,
    lora_ranks,
    stored,
)
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY, FewStepRecipe, Lora

if TYPE_CHECKING:
    import torch

HEAD_UPS = ("linear_2.weight", "linear_2.bias")
HEAD_NAMES = (*HEAD_UPS, "linear_1.weight", "linear_1.bias")


@dataclass(frozen=True, slots=True)
class RouteWeights:
    """One expert of a routed file.

    Attributes:
        tensors: Its LoRA, names as `save_adapter` takes them.
        centroid: Mean embedding of its prompts (`heads.routing.prompt_embedding`). Shape (width,).
    """

    tensors: "Mapping[str, torch.Tensor]"
    centroid: "torch.Tensor"


def save_lorad_adapter(
    path: Path | str,
    tensors: "Mapping[str, torch.Tensor]",
    *,
    recipe: FewStepRecipe,
    title: str,
    component: Component = "transformer",
    dtype: Dtype = "fp32",
    description: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write rotations of weight columns (LoRaD), or leave the old file as it was.

    The stored recipe says `lora.kind` "lorad".

    Args:
        path: Target, `*.safetensors`; its folder is made if needed.
        tensors: `<module>.lorad_A.weight` (out, rank) and `<module>.lorad_B.weight`
            (rank, in / 2), names as in the denoiser; any float dtype and device.
        recipe: How the adapter is sampled; its `lora.scale` is multiplied into A.
        title: Name for people.
        component: The pipeline component the modules are in.
        dtype: Stored precision.
        description: A sentence or two for people.
        metadata: More text for the file's metadata.

    Returns:
        The path written.

    Raises:
        AdapterError: Names, shapes or values do not make rotations, or a metadata key is taken.
        MissingExtraError: torch is not installed.
    """
    path = checked_target(path, component)
    _check_rotations(tensors)
    scale = recipe.lora.scale
    scaled = {n: scale * t.float() if n.endswith(ANGLES_A) else t for n, t in tensors.items()}
    data = {f"{component}.{name}": values for name, values in stored(scaled, {}, dtype).items()}
    lora = Lora(alpha="baked", kind="lorad")
    texts = Texts("lorad", title, description, metadata or {})
    return write_kind(path, data, dataclasses.replace(recipe, lora=lora), texts)


def save_two_time_adapter(
    path: Path | str,
    tensors: "Mapping[str, torch.Tensor]",
    head: "Mapping[str, torch.Tensor]",
    *,
    recipe: FewStepRecipe,
    rank: int,
    alpha: float,
    title: str,
    component: Component = "transformer",
    dtype: Dtype = "fp32",
    description: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA with the head that tells its network the target time.

    Args:
        path: As `save_lorad_adapter`, and so are the others not named here.
        tensors: The LoRA, names as `save_adapter` takes them.
        head: `TwoTimeHead.state_dict()`.
        recipe: Its `sampler.kind` is "flow_map"; its `lora.scale` is multiplied into both.
        rank: Of every module.
        alpha: Of every module.

    Raises:
        AdapterError: The tensors make no LoRA and head, or the recipe is of another kind.
        MissingExtraError: torch is not installed.
    """
    path = checked_target(path, component)
    if recipe.sampler.kind != "flow_map":
        raise AdapterError(
            f"a two-time head is sampled by sampler.kind 'flow_map', but the recipe says "
            f"{recipe.sampler.kind!r}; correct the recipe"
        )
    if sorted(head) != sorted(HEAD_NAMES):
        raise AdapterError(
            f"a two-time head has {', '.join(sorted(HEAD_NAMES))}, got {shown(sorted(head))}; pass "
            "the state_dict of a TwoTimeHead"
        )
    scale = recipe.lora.scale
    scaled = {n: scale * t.float() if n in HEAD_UPS else t for n, t in head.items()}
    lora = scaled_lora(tensors, recipe, rank, alpha, dtype)
    data = {f"{component}.{name}": values for name, values in lora.items()}
    data |= {f"{TWO_TIME}{name}": values for name, values in stored(scaled, {}, "fp32").items()}
    texts = Texts("two_time", title, description, metadata or {})
    return write_kind(path, data, dataclasses.replace(recipe, lora=Lora(alpha="baked")), texts)


def save_routed_adapter(
    path: Path | str,
    routes: Mapping[str, RouteWeights],
    *,
    recipe: FewStepRecipe,
    rank: int,
    alpha: float,
    title: str,
    component: Component = "transformer",
    dtype: Dtype = "fp32",
    description: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write several experts, each for a group of prompts, as one file.

    Args:
        path: As `save_lorad_adapter`, and so are the others not named here.
        routes: Name -> expert; the names are the adapters of `recipe.routes`.
        recipe: How any of them is sampled; its `lora.scale` is multiplied into all.
        rank: Of every module of every expert.
        alpha: Likewise.

    Raises:
        AdapterError: Names differ from the recipe's, an expert is no LoRA, or centroids are no
            vectors of one width.
        MissingExtraError: torch is not installed.
    """
    path = checked_target(path, component)
    names = [route.adapter for route in recipe.routes]
    if sorted(names) != sorted(routes):
        raise AdapterError(
            f"the recipe's routes are {names}, but experts {sorted(routes)} were passed; make them "
            "agree"
        )
    widths = {tuple(expert.centroid.shape) for expert in routes.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise AdapterError(
            f"centroids have the shapes {sorted(widths)}; wanted one vector (width,) per route"
        )
    data = {}
    for name, expert in routes.items():
        lora = scaled_lora(expert.tensors, recipe, rank, alpha, dtype)
        data |= {f"route.{name}.{component}.{key}": values for key, values in lora.items()}
        data |= stored({f"route.{name}.{CENTROID}": expert.centroid}, {}, "fp32")
    texts = Texts("routes", title, description, metadata or {})
    return write_kind(path, data, dataclasses.replace(recipe, lora=Lora(alpha="baked")), texts)


@dataclass(frozen=True, slots=True)
class Texts:
    """What the metadata tells people."""

    kind: Kind
    title: str
    description: str
    more: Mapping[str, str]


def scaled_lora(
    tensors: "Mapping[str, torch.Tensor]",
    recipe: FewStepRecipe,
    rank: int,
    alpha: float,
    dtype: Dtype,
) -> "dict[str, torch.Tensor]":
    """A LoRA as stored, the recipe's scale and alpha / rank multiplied in."""
    ranks = lora_ranks(tensors, rank, {}, {})
    factor = recipe.lora.scale * alpha / rank
    return stored(tensors, dict.fromkeys(ranks, factor), dtype)


def _check_rotations(tensors: "Mapping[str, torch.Tensor]") -> None:
    if not tensors:
        raise AdapterError("an adapter needs at least one module; got no tensors")
    for name in tensors:
        module = name.removesuffix(ANGLES_A).removesuffix(ANGLES_B)
        if module in (name, "") or parse_name(f"{module}.lora_A.weight").dialect != "bare":
            raise AdapterError(
                f"{shown(name)} is no name of a rotation; wanted <module>{ANGLES_A} and "
                f"<module>{ANGLES_B}, modules named as in the denoiser"
            )
        a, b = tensors.get(module + ANGLES_A), tensors.get(module + ANGLES_B)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            shapes = [None if one is None else list(one.shape) for one in (a, b)]
            raise AdapterError(
                f"{module} has lorad_A {shapes[0]} and lorad_B {shapes[1]}; wanted (out, rank) and "
                "(rank, in / 2) of one rank"
            )


def write_kind(
    path: Path, data: "Mapping[str, torch.Tensor]", recipe: FewStepRecipe, texts: Texts
) -> Path:
    """Write stored tensors with what the metadata of every kind says."""
    entries = {
        **checked_extra(texts.more),
        **modelspec(
            recipe,
            title=texts.title,
            description=texts.description,
            data_sha256="",  # filled in by the writer
            resolution=None,
            date=None,
            thumbnail_png=None,
        ),
        "format": "pt",
        METADATA_KEY: recipe.to_json(),
        NEEDS_KEY: needs_text(texts.kind),
    }
    write_safetensors(path, data, entries)
    return path
