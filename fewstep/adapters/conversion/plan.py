"""Which tensors of a file go to which layers of a base, from headers alone. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.adapters.conversion.name_index import NameIndex, Target, component_of, weights_of
from fewstep.adapters.conversion.parts import Part, split_name
from fewstep.adapters.conversion.text_names import text_target
from fewstep.adapters.coverage import fit_problem
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.modules import ConfigAlphas, is_rslora, lora_metadata, scalar_metadata_alpha
from fewstep.adapters.names import parse_name, shown
from fewstep.errors import AdapterError

Kind = Literal["lora", "diff", "lokr", "loha"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One adapted layer as the file has it.

    Attributes:
        name: The layer as the file spells it.
        target: What it is in the base; None for a text encoder's.
        text: (component, module) of a text encoder's layer; None for the denoiser's.
        kind: What its tensors are.
        tensors: Part -> tensor name.
        rank: Inner size; 0 for a `diff`.
        alpha: What the file says, else the rank.
    """

    name: str
    target: Target | None
    text: tuple[str, str] | None
    kind: Kind
    tensors: dict[Part, str]
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits and what does not.

    Attributes:
        sources: Layers that fit the base, and those of text encoders.
        offenders: Layer -> why it does not fit; empty for a file that fits.
        leftovers: Layer that does not fit -> its tensors.
    """

    sources: tuple[Source, ...]
    offenders: dict[str, str]
    leftovers: dict[str, dict[Part, str]]


def plan_conversion(
    header: AdapterHeader,
    base_shapes: Mapping[str, Shape],
    index: NameIndex,
    *,
    component: str,
    family: str | None,
) -> Plan:
    """Sort every tensor of a file to a layer of the base.

    Args:
        header: The file, or tensors in memory described like one.
        base_shapes: diffusers parameter name -> shape.
        index: The names of that base.
        component: The component that is wanted, where a file has several.
        family: Base family, for the names of text encoders.

    Raises:
        AdapterError: A layer is incomplete, or of a kind that no LoRA can express.
    """
    weights = weights_of(base_shapes)
    alphas = _Alphas(header)
    sources, offenders, leftovers = [], {}, {}
    for name, tensors in _layers(header, component).items():
        text = text_target(name, family)
        target = None if text else index.find(name)
        if text is None and target is None:
            offenders[name] = _stranger(tensors)
            leftovers[name] = tensors
            continue
        source = _source(header, alphas, name, tensors, target, text)
        problem = _problem(header, source, weights, base_shapes) if target else None
        if problem:
            offenders[name] = problem
            leftovers[name] = tensors
        else:
            sources.append(source)
    return Plan(tuple(sources), offenders, leftovers)


def _layers(header: AdapterHeader, component: str) -> dict[str, dict[Part, str]]:
    """Layer -> part -> tensor; of several denoisers in one file only the wanted one."""
    layers: dict[str, dict[Part, str]] = {}
    for full_name in header.tensors:
        body, part = split_name(full_name)
        found = layers.setdefault(body, {})
        if part in found:
            raise AdapterError(
                f"{header.path}: {shown(found[part])} and {shown(full_name)} are both the {part} "
                f"of {shown(body)}; keep one"
            )
        found[part] = full_name
    components = {component_of(body) for body in layers} - {None}
    if components == {"transformer", "transformer_2"}:
        layers = {b: found for b, found in layers.items() if component_of(b) in (component, None)}
    return layers


def _stranger(tensors: Mapping[Part, str]) -> str:
    if "unknown" in tensors:
        return "is neither LoRA, DoRA, LoKr, LoHa nor a delta of a layer"
    return "is not in the base"


def _source(
    header: AdapterHeader,
    alphas: "_Alphas",
    name: str,
    tensors: dict[Part, str],
    target: Target | None,
    text: tuple[str, str] | None,
) -> Source:
    kind = _kind(header, name, tensors)
    rank = _rank(header, kind, tensors)
    return Source(name, target, text, kind, tensors, rank, alphas.of(tensors, rank))


def _kind(header: AdapterHeader, name: str, tensors: Mapping[Part, str]) -> Kind:
    where = f"{header.path}: layer {shown(name)}"
    if "set_weight" in tensors:
        raise AdapterError(
            f"{where} has {shown(tensors['set_weight'])}, which replaces a weight; use a file of "
            "LoRA matrices"
        )
    if any(part.startswith("lokr") for part in tensors):
        return "lokr"
    if any(part.startswith("hada") for part in tensors):
        return "loha"
    if "down" in tensors or "up" in tensors:
        for part in ("down", "up"):
            if part not in tensors:
                raise AdapterError(
                    f"{where} has no {part} matrix; the file is incomplete, download it again"
                )
        return "lora"
    if tensors.keys() & {"diff", "diff_b"}:
        return "diff"
    raise AdapterError(
        f"{where} has only {', '.join(sorted(tensors))}, no matrices; the file is incomplete, "
        "download it again"
    )


def _rank(header: AdapterHeader, kind: Kind, tensors: Mapping[Part, str]) -> int:
    ranked: Sequence[Part] = {
        "lora": ("down",),
        "lokr": ("lokr_w2_b", "lokr_w1_b"),
        "loha": ("hada_w1_b",),
        "diff": (),
    }[kind]
    for part in ranked:
        if part in tensors and header.tensors[tensors[part]].shape:
            return header.tensors[tensors[part]].shape[0]
    return 0


class _Alphas:
    """What a file says of alpha, read once: tensors, then LoraConfig, then one plain number."""

    def __init__(self, header: AdapterHeader) -> None:
        tensors = [name for name in header.tensors if name.endswith(".alpha")]
        self._tensors = header.read_scalars(tensors)
        self._config = lora_metadata(header)
        self._config_alphas = ConfigAlphas(self._config)
        self._whole_file = scalar_metadata_alpha(header)

    def of(self, tensors: Mapping[Part, str], rank: int) -> float:
        """Alpha of one layer; the rank where the file says nothing."""
        if "alpha" in tensors:
            return self._tensors[tensors["alpha"]]
        name = parse_name(next(iter(tensors.values())))
        alpha = self._config_alphas.of(name)
        if alpha is not None:
            # alpha / sqrt(rank) there: the alpha that gives it by the usual alpha / rank.
            return alpha * math.sqrt(rank) if is_rslora(self._config, name) else alpha
        return float(rank) if self._whole_file is None else self._whole_file


def _problem(
    header: AdapterHeader,
    source: Source,
    weights: Mapping[str, Shape],
    base_shapes: Mapping[str, Shape],
) -> str | None:
    target = source.target
    assert target is not None
    whole = (sum(target.rows), *weights[target.parts[0]][1:])
    shape_of: dict[Part, Shape] = {
        part: header.tensors[name].shape for part, name in source.tensors.items()
    }
    if source.kind == "lora" and "mid" not in shape_of:
        size = len(whole)
        return fit_problem(as_dims(shape_of["down"], size), as_dims(shape_of["up"], size), whole)
    if source.kind == "diff":
        return _diff_problem(shape_of, whole, target, base_shapes)
    return None  # the size shows when it is expanded


def _diff_problem(
    shape_of: Mapping[Part, Shape],
    whole: Shape,
    target: Target,
    base_shapes: Mapping[str, Shape],
) -> str | None:
    diff, bias = shape_of.get("diff"), shape_of.get("diff_b")
    if diff is not None and math.prod(diff) != math.prod(whole):
        return f"has a delta of {list(diff)}, the base weight is {list(whole)}"
    if bias is not None:
        missing = [part for part in target.parts if f"{part}.bias" not in base_shapes]
        if missing:
            return f"has a bias delta, but {missing[0]} has no bias in the base"
        if bias != (sum(target.rows),):
            return f"has a bias delta of {list(bias)}, the base bias is [{sum(target.rows)}]"
    return None


def as_dims(shape: Shape, dims: int) -> Shape:
    """The shape with ones at its end added or taken off: a Linear written as a 1x1 convolution."""
    while len(shape) > dims and shape[-1] == 1:
        shape = shape[:-1]
    return (*shape, *(1,) * (dims - len(shape)))
