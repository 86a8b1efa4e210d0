"""An adapter file's tensors in names that ComfyUI's key map has, alpha beside them. No ComfyUI.

Two ways: converted, with every name and shape checked against the MODEL, for the families that
fewstep has name tables for; and as the file is, less a prefix, for all others.
"""

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.adapters import AdapterHeader, check_values, lora_modules, open_adapter
from fewstep.adapters.conversion import convert_to_diffusers
from fewstep.adapters.conversion.name_index import NameIndex, component_of
from fewstep.adapters.conversion.name_rules import RULES, UNETS, filled, pattern_of
from fewstep.adapters.conversion.parts import split_name, without_prefixes
from fewstep.adapters.conversion.plan import plan_conversion
from fewstep.adapters.conversion.reading import without_effectless
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.conversion.through_diffusers import needs_diffusers
from fewstep.adapters.conversion.writing import COMFYUI, in_format
from fewstep.adapters.kinds import TWO_NETWORKS
from fewstep.adapters.names import parse_name
from fewstep.adapters.values import check_dtypes

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
NUM_KEPT = 2
"""Files whose tensors stay in memory: the two experts of a pair."""


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """A file's tensors in ComfyUI's names.

    Attributes:
        tensors: Name -> values; the denoiser's only.
        left_out: Layers of the file, in its own spelling, that the MODEL does not have.
        text_layers: Layers for text encoders, which no MODEL has.
    """

    tensors: "Mapping[str, torch.Tensor]"
    left_out: tuple[str, ...] = ()
    text_layers: int = 0


def base_shapes(family: str | None, native: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """diffusers parameter name -> shape of a transformer, from its own names and shapes.

    Args:
        family: As recipes spell it.
        native: Parameter name -> shape, as in the authors' checkpoints.

    Returns:
        None for a family without a name table.
    """
    if family not in RULES or family not in COMFYUI or family in UNETS:
        return None
    found: dict[str, Shape] = {}
    for name, shape in native.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or not shape:
            continue
        for rule in RULES[family]:
            if match := pattern_of(rule.native).fullmatch(module):
                width = native.get(f"{module}.weight", shape)[-1]
                for part, rows in zip(
                    rule.parts, _rows(shape[0], len(rule.parts), width), strict=True
                ):
                    found[f"{filled(part, match.groups())}.{kind}"] = (rows, *shape[1:])
                break
    return found


def converted(
    path: Path, stamp: str, shapes: Mapping[str, Shape], *, family: str, component: str
) -> NamedTensors | None:
    """The file converted for a base, as much of it as fits; kept in memory for the next call.

    Args:
        path: The file.
        stamp: `lora_file.fingerprint` of it.
        shapes: diffusers parameter name -> shape of the MODEL.
        family: Of the MODEL, as recipes spell it.
        component: Pipeline component that is wanted, where a file has two.

    Returns:
        None where only diffusers could read the file's names.

    Raises:
        AdapterError: The file is damaged, or of a kind that cannot be said in these names.
    """
    return _converted(path, stamp, tuple(shapes.items()), family, component)


def as_it_is(path: Path, stamp: str, known: Container[str], *, component: str) -> NamedTensors:
    """The file's own names, less a prefix where ComfyUI knows the rest; alpha as tensors.

    Args:
        path: The file.
        stamp: `lora_file.fingerprint` of it.
        known: ComfyUI's layer names.
        component: As `converted`.

    Raises:
        AdapterError: The file is damaged.
    """
    import torch

    header, tensors, alphas = _everything(path, stamp, component)
    named: dict[str, torch.Tensor] = {}
    for name, values in tensors.items():
        body, part = split_name(name)
        place = _known_as(body, known)
        named[f"{place}{name[len(body) :]}" if name.startswith(body) else name] = values
        if part == "down" and body in alphas:
            named[f"{place}.alpha"] = torch.tensor(alphas[body])
    text = {split_name(name)[0] for name in header.tensors if parse_name(name).is_text_encoder}
    return NamedTensors(named, text_layers=len(text))


@functools.lru_cache(maxsize=NUM_KEPT)
def _converted(
    path: Path,
    stamp: str,
    shapes: tuple[tuple[str, Shape], ...],
    family: str,
    component: str,
) -> NamedTensors | None:
    header, base = open_adapter(path), dict(shapes)
    if needs_diffusers(header, family):
        return None
    check_dtypes(header)
    check_values(header)
    index = NameIndex(family, base)
    plan = plan_conversion(header, base, index, component=component, family=family)
    plan = without_effectless(plan, open_tensors(header))
    text = sum(source.text is not None for source in plan.sources)
    misfits = {tensor for name in plan.offenders for tensor in plan.leftovers[name].values()}
    if len(plan.sources) == text:
        return NamedTensors({}, tuple(plan.offenders), text)
    fitting = replace(
        header, tensors={n: info for n, info in header.tensors.items() if n not in misfits}
    )
    adapter = convert_to_diffusers(fitting, base, component=component, family=family)
    file = in_format(replace(adapter, text_tensors={}, text_alphas={}), base, "comfyui")
    return NamedTensors(file.tensors, tuple(plan.offenders), text)


@functools.lru_cache(maxsize=NUM_KEPT)
def _everything(
    path: Path, stamp: str, component: str
) -> "tuple[AdapterHeader, dict[str, torch.Tensor], dict[str, float]]":
    """Header, the denoiser's tensors, and alphas that are not tensors, by layer."""
    header = open_adapter(path)
    check_values(header)
    modules = lora_modules(header)
    by_name = {(m.name.component, m.name.module): m.alpha for m in modules}
    read, others = open_tensors(header), set(TWO_NETWORKS) - {component}
    has_both = {component_of(name) for name in header.tensors} >= set(TWO_NETWORKS)
    tensors, alphas = {}, {}
    for name in header.tensors:
        parsed = parse_name(name)
        if parsed.is_text_encoder or (has_both and parsed.component in others):
            continue
        tensors[name] = read(name)
        body, part = split_name(name)
        alpha = by_name.get((parsed.component, parsed.module))
        if part == "down" and alpha is not None and f"{body}.alpha" not in header.tensors:
            alphas[body] = alpha
    return header, tensors, alphas


def _known_as(body: str, known: Container[str]) -> str:
    for name in without_prefixes(body):
        for spelled in (name, f"diffusion_model.{name}", f"transformer.{name}"):
            if spelled in known:
                return spelled
    return body


def _rows(height: int, count: int, width: int) -> list[int]:
    """Equal parts; of a single stream's `linear1`, queries as wide as the input, then the rest."""
    if count == 4:
        return [width] * 3 + [height - 3 * width]
    return [height // count] * count
