"""Does this adapter fit this base? Every module must, or the answer is an error.

Hosts load LoRA files by name and stay silent about what they did not find, so a wrong or renamed
file gives a slightly or completely wrong picture. This check runs first, from headers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.modules import LoraModule, lora_modules, other_tensors
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Proof that an adapter fits a base.

    Attributes:
        matched: Modules of the adapter found in the base; equals `modules`.
        modules: Modules of the adapter that are for the denoiser.
        ranks: Base module name -> rank; the component in front where the file has several.
        alphas: The same -> alpha; the rank where the file says nothing.
        text_encoder_modules: Modules for text encoders, which this check does not look at.
    """

    matched: int
    modules: int
    ranks: dict[str, int]
    alphas: dict[str, float]
    text_encoder_modules: int = 0


def check_coverage(header: AdapterHeader, base_shapes: Mapping[str, Shape]) -> Coverage:
    """Check that every LoRA module of a file fits a weight of the base denoiser.

    Names count as equal when diffusers would load one onto the other: with or without component
    prefix, or flattened with underscores as kohya does.

    Args:
        header: The adapter.
        base_shapes: Parameter name -> shape of the base denoiser, diffusers names.

    Returns:
        What was matched; all of it.

    Raises:
        AdapterError: No module, none or only some fit; the first offender is named.
    """
    others = other_tensors(header)
    if others:
        raise AdapterError(
            f"{header.path}: {len(others)} of {len(header.tensors)} tensors are not plain LoRA "
            f"(first: {shown(others[0])}); use a file of LoRA down and up matrices only"
        )
    everything = lora_modules(header)
    modules = [module for module in everything if not module.name.is_text_encoder]
    if not modules:
        raise AdapterError(
            f"{header.path}: no LoRA modules for the denoiser among {len(header.tensors)} tensors; "
            "give a LoRA file made for this base"
        )
    dialects = sorted({module.name.dialect for module in modules})
    if len(dialects) > 1:
        raise AdapterError(
            f"{header.path}: mixes {' and '.join(dialects)} names, of which a host would load only "
            "some; save it with one kind of names"
        )
    matched = _match(header, modules, base_shapes)
    return Coverage(
        matched=len(matched),
        modules=len(modules),
        ranks={name: module.rank for name, module in matched.items()},
        alphas={
            name: float(module.rank) if module.alpha is None else module.alpha
            for name, module in matched.items()
        },
        text_encoder_modules=len(everything) - len(modules),
    )


def _match(
    header: AdapterHeader, modules: Sequence[LoraModule], base_shapes: Mapping[str, Shape]
) -> dict[str, LoraModule]:
    weights = {
        name.removesuffix(".weight"): shape
        for name, shape in base_shapes.items()
        if name.endswith(".weight")
    }
    flattened = {name.replace(".", "_"): name for name in weights}
    several = len({module.name.component for module in modules}) > 1
    matched: dict[str, LoraModule] = {}
    offenders: list[str] = []
    for module in modules:
        name = module.name.module
        if module.name.dialect == "kohya":
            name = flattened.get(name, name)
        problem = _problem(module, weights.get(name))
        if problem is not None:
            offenders.append(f"{shown(name)} {problem}")
        matched[f"{module.name.component}.{name}" if several else name] = module
    if offenders:
        raise AdapterError(_refusal(header, modules, offenders))
    return matched


def _problem(module: LoraModule, weight: Shape | None) -> str | None:
    if weight is None:
        return "is not in the base"
    return fit_problem(module.down.shape, module.up.shape, weight)


def fit_problem(down: Shape, up: Shape, weight: Shape) -> str | None:
    """Why a pair of matrices does not fit a weight, or None.

    Args:
        down: (rank, in, k, ...).
        up: (out, rank, 1, ...).
        weight: Linear (out, in) or ConvNd (out, in, k, ...).
    """
    if len(down) >= 2 and len(weight) >= 2:
        rank = down[0]
        ones = (1,) * (len(weight) - 2)
        wanted_down, wanted_up = (rank, *weight[1:]), (weight[0], rank, *ones)
        if (down, up) == (wanted_down, wanted_up):
            return None
        if down == (rank, *weight[:1], *weight[2:]) and up == (*weight[1:2], rank, *ones):
            return f"is transposed: the base weight is {list(weight)}"
    return f"has down {list(down)} and up {list(up)}, the base weight is {list(weight)}"


def _refusal(header: AdapterHeader, modules: Sequence[LoraModule], offenders: Sequence[str]) -> str:
    fitting = len(modules) - len(offenders)
    count = f"only {fitting}" if fitting else "none"
    dialect = modules[0].name.dialect
    advice = "use an adapter made for this base"
    if not fitting and dialect in ("kohya", "ComfyUI native"):
        advice += f", or convert its {dialect} names to diffusers names"
    return (
        f"{header.path}: {count} of {len(modules)} LoRA modules fit this base; the first that does "
        f"not: {offenders[0]}; {advice}"
    )
