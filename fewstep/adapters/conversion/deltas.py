"""Whole deltas of a layer: `diff`, LoKr, LoHa and LoRA with a middle matrix, alpha applied.

    LoKr:  (w1 kron w2) * scale          LoHa:  (w1_a w1_b) * (w2_a w2_b) * scale

scale is alpha / rank where a matrix is stored as two factors, else 1. Formulas as in LyCORIS 3
(arXiv:2309.14859) and in diffusers' `_bake_lokr_alpha_`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.fused import swapped
from fewstep.adapters.conversion.name_index import Target
from fewstep.adapters.conversion.plan import Source
from fewstep.adapters.conversion.tensor_reading import Read
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


def whole_deltas(
    header: AdapterHeader, source: Source, read: Read, base_shapes: Mapping[str, Shape]
) -> "dict[str, torch.Tensor]":
    """Parameter of the base -> what is added to it.

    Raises:
        AdapterError: A text encoder's layer is not plain LoRA, or the delta does not fit.
    """
    where = f"{header.path}: layer {shown(source.name)}"
    target = source.target
    if target is None:
        raise AdapterError(
            f"{where} is {source.kind} of a text encoder, which is not supported; use a file with "
            "plain LoRA there"
        )
    found = {}
    try:
        weight = _weight_delta(source, read)
    except (KeyError, RuntimeError) as error:  # a matrix is missing, or two do not multiply
        raise AdapterError(
            f"{where} has {source.kind} matrices that do not make one delta "
            f"({', '.join(sorted(source.tensors))}); the file is damaged, download it again"
        ) from error
    if weight is not None:
        shapes = [base_shapes[f"{part}.weight"] for part in target.parts]
        whole = (sum(target.rows), *shapes[0][1:])
        if weight.numel() != math.prod(whole):
            raise AdapterError(
                f"{where} expands to {list(weight.shape)}, the base weight is {list(whole)}; use "
                "an adapter made for this base"
            )
        found |= _by_part(target, weight.reshape(whole), "weight")
    for part in ("diff_b", "up_bias"):
        if part in source.tensors:
            bias = read(source.tensors[part])
            if bias.shape != (sum(target.rows),):
                raise AdapterError(
                    f"{where} has a bias delta of {list(bias.shape)}, wanted "
                    f"[{sum(target.rows)}]; use an adapter made for this base"
                )
            if part == "up_bias" and source.alpha != source.rank:
                bias = bias * (source.alpha / source.rank)
            found |= _by_part(target, bias, "bias")
    missing = [name for name in found if name not in base_shapes]
    if missing:
        raise AdapterError(f"{where} changes {missing[0]}, which the base does not have")
    return found


def _by_part(target: Target, rows: "torch.Tensor", kind: str) -> "dict[str, torch.Tensor]":
    if target.swaps:
        rows = swapped(rows)
    parts = rows.split(list(target.rows))
    return {
        f"{part}.{kind}": values.contiguous()
        for part, values in zip(target.parts, parts, strict=True)
    }


def _weight_delta(source: Source, read: Read) -> "torch.Tensor | None":
    tensors = {part: read(name) for part, name in source.tensors.items() if part != "alpha"}
    if source.kind != "diff":  # torch multiplies no 8-bit floats
        tensors = {p: t.float() if t.element_size() == 1 else t for p, t in tensors.items()}
    if source.kind == "diff":
        return tensors.get("diff")
    if source.kind == "lokr":
        return _lokr(tensors, source)
    if source.kind == "loha":
        return _loha(tensors, source)
    if "mid" in tensors:
        return _tucker(tensors["mid"], tensors["up"], tensors["down"]) * _scale(source)
    return tensors.get("diff")


def _scale(source: Source) -> float:
    return source.alpha / source.rank if source.rank else 1.0


def _lokr(tensors: "Mapping[str, torch.Tensor]", source: Source) -> "torch.Tensor":
    import torch

    first, second = (_kron_factor(tensors, name) for name in ("lokr_w1", "lokr_w2"))
    while first.ndim < second.ndim:
        first = first.unsqueeze(-1)
    return torch.kron(first, second) * _scale(source)


def _kron_factor(tensors: "Mapping[str, torch.Tensor]", name: str) -> "torch.Tensor":
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in tensors:
        return _tucker(tensors["lokr_t2"], a.T, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _loha(tensors: "Mapping[str, torch.Tensor]", source: Source) -> "torch.Tensor":
    halves = []
    for i in (1, 2):
        a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
        core = tensors.get(f"hada_t{i}")
        halves.append(a @ b if core is None else _tucker(core, a.T, b))
    return halves[0] * halves[1] * _scale(source)


def _tucker(core: "torch.Tensor", up: "torch.Tensor", down: "torch.Tensor") -> "torch.Tensor":
    """sum_ij up[o, i] core[i, j, k, l] down[j, n]: (out, in, k, l)."""
    import torch

    return torch.einsum("ijkl,oi,jn->onkl", core, up.flatten(1), down.flatten(1))
