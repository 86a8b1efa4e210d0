"""Any adapter file to diffusers names, exactly and completely, or one sentence why not."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.converted import DOWN, MAGNITUDE, UP, ConvertedAdapter
from fewstep.adapters.conversion.fused import FUSED_KEY, Factors, fused_ranks, split
from fewstep.adapters.conversion.name_index import NameIndex, Target
from fewstep.adapters.conversion.name_rules import RULES
from fewstep.adapters.conversion.plan import Plan, Source, as_dims, plan_conversion
from fewstep.adapters.conversion.tensor_reading import Read, open_tensors
from fewstep.adapters.conversion.through_diffusers import (
    LOADERS,
    needs_diffusers,
    through_diffusers,
)
from fewstep.adapters.coverage import Coverage
from fewstep.adapters.families import family_of_base
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


def convert_to_diffusers(
    header: AdapterHeader,
    base_shapes: Mapping[str, Shape],
    *,
    component: str,
    family: str | None = None,
) -> ConvertedAdapter:
    """Read an adapter of any naming as modules of a diffusers denoiser.

    Values are never changed: factors come out as they are in the file, alpha beside them.

    Args:
        header: The file.
        base_shapes: diffusers parameter name -> shape of the denoiser.
        component: Pipeline component the denoiser is, such as "transformer".
        family: Base family as recipes spell it; None: seen from the base's own names.

    Raises:
        AdapterError: Nothing or only a part of the file fits; the first offender is named.
        MissingExtraError: torch is not installed.
    """
    read = open_tensors(header)
    if family not in RULES and family not in LOADERS:
        family = family_of_base(base_shapes)
    if needs_diffusers(header, family):
        assert family is not None
        header, read = through_diffusers(header, family, read)
    index = NameIndex(family, base_shapes)
    plan = plan_conversion(header, base_shapes, index, component=component, family=family)
    plan = without_effectless(plan, read)
    if plan.offenders:
        raise AdapterError(_refusal(header, plan))
    return _collected(header, plan, read, base_shapes, component, family)


def without_effectless(plan: Plan, read: Read) -> Plan:
    """The plan less the layers that do not fit but whose delta is zero throughout.

    Some trainers write zero matrices for layers they never trained, of other models even.
    """
    if not plan.offenders:
        return plan
    for name, tensors in plan.leftovers.items():
        product = tensors.get("up"), tensors.get("diff"), tensors.get("diff_b")
        named = [tensor for tensor in product if tensor is not None]
        if named and not any(bool(read(tensor).any()) for tensor in named):
            plan.offenders.pop(name)
    return plan


def _refusal(header: AdapterHeader, plan: Plan) -> str:
    fitting = sum(source.text is None for source in plan.sources)
    name, problem = next(iter(plan.offenders.items()))
    return (
        f"{header.path}: {f'only {fitting}' if fitting else 'none'} of "
        f"{fitting + len(plan.offenders)} modules fit this base; the first that does not: "
        f"{shown(name)} {problem}; use an adapter made for this base"
    )


def _collected(
    header: AdapterHeader,
    plan: Plan,
    read: Read,
    base_shapes: Mapping[str, Shape],
    component: str,
    family: str | None,
) -> ConvertedAdapter:
    from fewstep.adapters.conversion.deltas import whole_deltas

    collector = _Collector(header, read, base_shapes)
    extras: dict[str, torch.Tensor] = {}
    for source in plan.sources:
        if source.kind == "lora" and "mid" not in source.tensors:
            collector.add(source)
        if source.kind != "lora" or source.tensors.keys() & {"mid", "diff", "diff_b", "up_bias"}:
            for name, delta in whole_deltas(header, source, read, base_shapes).items():
                if name in extras:
                    raise AdapterError(f"{header.path}: has two deltas for {name}; keep one")
                extras[name] = delta
    if not collector.ranks and not extras:
        raise AdapterError(
            f"{header.path}: no LoRA modules for the denoiser among {len(header.tensors)} tensors; "
            "give a LoRA file made for this base"
        )
    touched = {*collector.ranks, *(name.rpartition(".")[0] for name in extras)}
    return ConvertedAdapter(
        header=header,
        component=component,
        tensors=collector.tensors,
        alphas=collector.alphas,
        ranks=collector.ranks,
        text_tensors=collector.text_tensors,
        text_alphas=collector.text_alphas,
        extras=extras,
        coverage=Coverage(
            matched=len(touched),
            modules=len(touched),
            ranks=dict(collector.ranks),
            alphas=dict(collector.alphas),
            text_encoder_modules=sum(source.text is not None for source in plan.sources),
        ),
        family=family,
    )


class _Collector:
    """Gathers factors under diffusers names."""

    def __init__(self, header: AdapterHeader, read: Read, base_shapes: Mapping[str, Shape]) -> None:
        self._header, self._read, self._shapes = header, read, base_shapes
        self._layouts = _layouts(header)
        self.tensors: dict[str, torch.Tensor] = {}
        self.alphas: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.text_tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.text_alphas: dict[str, dict[str, float]] = {}

    def add(self, source: Source) -> None:
        """Read one layer."""
        factors = self._factors(source)
        if source.text is not None:
            component, module = source.text
            tensors = self.text_tensors.setdefault(component, {})
            alphas = self.text_alphas.setdefault(component, {})
            self._store(tensors, alphas, module, factors)
            return
        assert source.target is not None
        for module, part in zip(
            source.target.parts, self._parts(source.target, factors), strict=True
        ):
            if part is not None:
                self._store(self.tensors, self.alphas, module, part)
                self.ranks[module] = part.rank

    def _factors(self, source: Source) -> Factors:
        down, up = (self._read(source.tensors[part]) for part in ("down", "up"))
        if source.target is not None:
            dims = len(self._shapes[f"{source.target.parts[0]}.weight"])
            down = down.reshape(as_dims(tuple(down.shape), dims))
            up = up.reshape(as_dims(tuple(up.shape), dims))
        magnitude = None
        if "magnitude" in source.tensors:
            magnitude = self._read(source.tensors["magnitude"])
            if magnitude.numel() != up.shape[0] or magnitude.shape[0] != up.shape[0]:
                raise AdapterError(
                    f"{self._header.path}: {shown(source.tensors['magnitude'])} of shape "
                    f"{list(magnitude.shape)} normalises the inputs of a layer, which no diffusers "
                    "DoRA does; train it with norms of the outputs"
                )
            magnitude = magnitude.reshape(-1)
        return Factors(down, up, source.alpha, magnitude)

    def _parts(self, target: Target, factors: Factors) -> list[Factors | None]:
        if target.swaps:
            factors = factors.swapped()
        if len(target.parts) == 1:
            return [factors]
        said = fused_ranks(self._layouts, target.native or "")
        return split(factors, target.rows, said)

    def _store(
        self,
        tensors: "dict[str, torch.Tensor]",
        alphas: dict[str, float],
        module: str,
        factors: Factors,
    ) -> None:
        if module in alphas:
            self._check_repeated(tensors, alphas, module, factors)
            return
        tensors[module + DOWN], tensors[module + UP] = factors.down, factors.up
        if factors.magnitude is not None:
            tensors[module + MAGNITUDE] = factors.magnitude
        alphas[module] = factors.alpha

    def _check_repeated(
        self,
        tensors: "Mapping[str, torch.Tensor]",
        alphas: Mapping[str, float],
        module: str,
        factors: Factors,
    ) -> None:
        """A layer may be there under two names if both say the same."""
        import torch

        is_equal = alphas[module] == factors.alpha and all(
            torch.equal(tensors[module + end], values)
            for end, values in ((DOWN, factors.down), (UP, factors.up))
        )
        if not is_equal:
            raise AdapterError(
                f"{self._header.path}: has two different LoRAs for {module} under two names; "
                "keep one"
            )


def _layouts(header: AdapterHeader) -> Mapping[str, object]:
    try:
        table = json.loads(header.metadata.get(FUSED_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
