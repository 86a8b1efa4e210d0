"""What a base must look like for a file to fit it: for converting without the base at hand.

Only names and shapes of the adapted layers are known then, so nothing proves that the file fits a
real model; everything the file says about itself is still checked.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fewstep.adapters.conversion.name_index import component_of
from fewstep.adapters.conversion.name_rules import RULES, filled, pattern_of
from fewstep.adapters.conversion.parts import Part, split_name, without_prefixes
from fewstep.adapters.conversion.rules import Rule
from fewstep.adapters.conversion.text_names import text_target
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

Shape = tuple[int, ...]


class _Match(NamedTuple):
    rule: Rule
    numbers: tuple[str, ...]
    is_native: bool
    part: str


def shapes_of_file(header: AdapterHeader, family: str) -> dict[str, Shape]:
    """diffusers parameter name -> shape, of the layers a file adapts.

    Args:
        header: The file.
        family: A key of `name_rules.RULES`.

    Raises:
        AdapterError: The family is unknown, or a layer's name or shape says too little.
    """
    if family not in RULES:
        raise AdapterError(
            f"{header.path}: layer names of family {family!r} are not known; known are "
            f"{', '.join(RULES)}; give --base, the folder of the model it is for"
        )
    layers: dict[str, dict[Part, str]] = {}
    for full_name in header.tensors:
        body, part = split_name(full_name)
        layers.setdefault(body, {})[part] = full_name
    shapes: dict[str, Shape] = {}
    for body, tensors in layers.items():
        if text_target(body, family) is None:
            shapes.update(_layer_shapes(header, body, tensors, family))
    return shapes


def _layer_shapes(
    header: AdapterHeader, body: str, tensors: Mapping[Part, str], family: str
) -> Iterator[tuple[str, Shape]]:
    shape_of: dict[Part, Shape] = {p: header.tensors[name].shape for p, name in tensors.items()}
    whole = _whole(shape_of)
    match = _find(body, family)
    if whole is None or (match is None and component_of(body) is None):
        raise AdapterError(
            f"{header.path}: what layer {shown(body)} is cannot be seen without its base; give "
            "--base, the folder of the model it is for"
        )
    if match is None:
        modules = [body[body.index(".") + 1 :]]
    elif match.is_native:
        modules = [filled(part, match.numbers) for part in match.rule.parts]
    else:
        modules = [filled(match.part, match.numbers)]
    for module, rows in zip(modules, _rows(whole, len(modules)), strict=True):
        if shape_of.keys() & {"down", "diff"}:
            yield f"{module}.weight", (rows, *whole[1:])
        if shape_of.keys() & {"diff_b", "up_bias"}:
            yield f"{module}.bias", (rows,)


def _whole(shape_of: Mapping[Part, Shape]) -> Shape | None:
    down, up = shape_of.get("down"), shape_of.get("up")
    if down is not None and up is not None and len(down) >= 2 and up:
        return (up[0], *down[1:])
    return shape_of.get("diff") or shape_of.get("diff_b")


def _rows(whole: Shape, count: int) -> list[int]:
    """Equal thirds; of a single stream's `linear1`, queries as wide as the input, then the rest."""
    if count == 4:
        return [whole[1]] * 3 + [whole[0] - 3 * whole[1]]
    return [whole[0] // count] * count


def _find(body: str, family: str) -> _Match | None:
    for name in without_prefixes(body):
        is_flat = "." not in name
        for rule in RULES[family]:
            for part in rule.parts:
                if match := pattern_of(part, flat=is_flat).fullmatch(name):
                    return _Match(rule, match.groups(), False, part)
            if match := pattern_of(rule.native, flat=is_flat).fullmatch(name):
                return _Match(rule, match.groups(), True, rule.native)
    return None
