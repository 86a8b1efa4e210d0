"""Everything that can be known of an adapter before a model is touched: headers and numbers only.

    header, values, coverage -> PreflightReport, or one AdapterError that says why not

What would give a wrong picture is an error: a damaged number, a dtype no host reads, a module that
the base does not have. What only looks odd is a sentence in the report. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.adapters.conversion.name_index import NameIndex
from fewstep.adapters.conversion.plan import Plan, plan_conversion
from fewstep.adapters.coverage import Coverage
from fewstep.adapters.expert_tags import ExpertTag, components_of, expert_tags
from fewstep.adapters.families import KNOWN, family_of_base, guess_family
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.kinds import adapter_parts, check_rotations
from fewstep.adapters.modules import LoraModule, lora_metadata
from fewstep.adapters.names import DENOISER, shown
from fewstep.adapters.rank_table import RankRow, rank_table, scale_problems
from fewstep.adapters.values import check_dtypes, check_values, is_zero
from fewstep.errors import AdapterError

Shape = tuple[int, ...]
UNETS = ("sd15", "sd2", "sdxl")
"""Their layers have the same names, so a base of one looks like a base of the others."""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """An adapter that fits a base, and what is known of it.

    Attributes:
        path: The file.
        container: Whether it is safetensors or a pickle.
        num_bytes: Its size.
        dtypes: Of the tensors, safetensors' names.
        family: Base family that the module names look like; None where they do not tell.
        base_family: Base family that the base's parameter names look like.
        ranks: The rank table, most modules first.
        components: Pipeline components that the file names; () where it names none.
        expert: The phase expert it is; None where nothing says so.
        coverage: Proof that every module fits the base.
        problems: What looks odd though it can be loaded; one sentence each.
    """

    path: Path
    container: Literal["safetensors", "pickle"]
    num_bytes: int
    dtypes: tuple[str, ...]
    family: str | None
    base_family: str | None
    ranks: tuple[RankRow, ...]
    components: tuple[str, ...]
    expert: ExpertTag | None
    coverage: Coverage
    problems: tuple[str, ...]


def preflight(
    header: AdapterHeader, base_shapes: Mapping[str, Shape], *, component: str = "transformer"
) -> PreflightReport:
    """Check an adapter against a base before anything is loaded.

    Reads every number of the file once (`check_values`), the base's weights not at all.

    Args:
        header: From `open_adapter`.
        base_shapes: Parameter name -> shape of the base denoiser, diffusers names.
        component: The pipeline component the base is, for files with modules for several.

    Raises:
        AdapterError: The file is damaged, holds numbers that are not finite or of a dtype hosts do
            not read, or not all of it fits the base; the first offender is named.
        RecipeError: It carries a recipe that is not valid.
    """
    check_dtypes(header)
    coverage = coverage_of(header, base_shapes, component=component)
    check_values(header)
    modules = adapter_parts(header).modules()
    table = rank_table(modules)
    tags = expert_tags(header)
    family, base_family = guess_family(modules), family_of_base(base_shapes)
    return PreflightReport(
        path=header.path,
        container=header.container,
        num_bytes=header.num_bytes,
        dtypes=tuple(sorted({info.dtype for info in header.tensors.values()})),
        family=family,
        base_family=base_family,
        ranks=table,
        components=named_components(header),
        expert=tags[0] if tags else None,
        coverage=coverage,
        problems=(
            *scale_problems(table),
            *alpha_problems(header, modules),
            *expert_problems(tags),
            *_recipe_problems(header, base_family),
        ),
    )


def coverage_of(
    header: AdapterHeader, base_shapes: Mapping[str, Shape], *, component: str = "transformer"
) -> Coverage:
    """Check that every module of a file, whatever its naming, fits the base; headers only.

    Layers that the base does not have but whose matrices are zero count as fitting: trainers write
    them for layers that were never trained. A file of which nothing fits is refused all the same.

    Args:
        header: The file.
        base_shapes: Parameter name -> shape of the base denoiser, diffusers names.
        component: The pipeline component the base is, for files with modules for several.

    Raises:
        AdapterError: No module or only some fit; the first offender is named.
    """
    parts = adapter_parts(header)
    if parts.routes:
        found = [
            coverage_of(expert, base_shapes, component=component)
            for expert in parts.routes.values()
        ]
        return _together(parts.routes, found)
    if rotations := parts.rotations_on(component):
        check_rotations(header, rotations, base_shapes)
        ranks = {rotation.name.module: rotation.rank for rotation in rotations}
        alphas = {module: float(rank) for module, rank in ranks.items()}
        return Coverage(len(ranks), len(ranks), ranks, alphas)
    header, family = parts.lora, family_of_base(base_shapes)
    index = NameIndex(family, base_shapes)
    plan = plan_conversion(header, base_shapes, index, component=component, family=family)
    sources = [source for source in plan.sources if source.target is not None]
    offenders = [name for name in plan.offenders if not sources or not _is_idle(header, plan, name)]
    if offenders:
        raise AdapterError(_refusal(header, plan, offenders, len(sources), family))
    if not sources:
        raise AdapterError(
            f"{header.path}: no LoRA modules for the denoiser among {len(header.tensors)} tensors; "
            "give a LoRA file made for this base"
        )
    ranks, alphas = {}, {}
    for source in sources:
        for part in source.target.parts if source.target else ():
            ranks[part], alphas[part] = source.rank, source.alpha
    return Coverage(
        matched=len(sources),
        modules=len(sources),
        ranks=ranks,
        alphas=alphas,
        text_encoder_modules=len(plan.sources) - len(sources),
    )


def _together(names: Iterable[str], found: Sequence[Coverage]) -> Coverage:
    """Of several experts in one file, the expert's name in front of its modules."""
    ranks, alphas = {}, {}
    for name, one in zip(names, found, strict=True):
        ranks |= {f"{name}.{module}": rank for module, rank in one.ranks.items()}
        alphas |= {f"{name}.{module}": alpha for module, alpha in one.alphas.items()}
    return Coverage(
        sum(one.matched for one in found), sum(one.modules for one in found), ranks, alphas
    )


def named_components(header: AdapterHeader) -> tuple[str, ...]:
    """Pipeline components in the names of a file's tensors, sorted; kohya's text encoders too."""
    return tuple(name for name in components_of(header) if name != DENOISER)


def alpha_problems(header: AdapterHeader, modules: Sequence[LoraModule]) -> list[str]:
    """Where readers disagree about this file's alpha; one sentence each."""
    has_tensors = any(name.endswith(".alpha") for name in header.tensors)
    if has_tensors and lora_metadata(header):
        return ["alpha is in tensors and in lora_adapter_metadata: diffusers refuses both"]
    if not has_tensors and any(m.alpha not in (None, m.rank) for m in modules):
        return [
            "alpha differs from rank and is only in the metadata: ComfyUI does not read it and "
            "applies scale 1"
        ]
    return []


def expert_problems(tags: Sequence[ExpertTag]) -> list[str]:
    """Where the places that say which expert a file is contradict each other."""
    return [
        f"{tags[0].known_by} says this is {shown(tags[0].name)}, {tag.known_by} says it is "
        f"{shown(tag.name)}"
        for tag in tags[1:]
        if tag.name != tags[0].name
    ]


def _is_idle(header: AdapterHeader, plan: Plan, name: str) -> bool:
    tensors = plan.leftovers.get(name, {})
    products = [tensors[part] for part in ("up", "diff", "diff_b") if part in tensors]
    return bool(products) and all(is_zero(header, tensor) for tensor in products)


def _refusal(
    header: AdapterHeader, plan: Plan, offenders: Sequence[str], fitting: int, family: str | None
) -> str:
    guess = guess_family(adapter_parts(header).modules())
    looks = ""
    if guess and family and not may_be_of(guess, family):
        looks = f" (its names look like {guess}, the base is {family})"
    first = offenders[0]
    return (
        f"{header.path}: {f'only {fitting}' if fitting else 'none'} of {fitting + len(offenders)} "
        f"modules fit this base{looks}; the first that does not: {shown(first)} "
        f"{plan.offenders[first]}; use an adapter made for this base"
    )


def may_be_of(guess: str, family: str) -> bool:
    """Whether a guess such as "pixart or sana" allows for the family that a base looks like."""
    options = guess.split(" or ")
    return family in options or (family in UNETS and any(o in UNETS for o in options))


def _recipe_problems(header: AdapterHeader, base_family: str | None) -> list[str]:
    recipe = header.recipe()
    if recipe is None or base_family is None or recipe.base.family not in KNOWN:
        return []
    if may_be_of(recipe.base.family, base_family):
        return []
    return [f"the recipe says {shown(recipe.base.family)}, the base looks like {base_family}"]
