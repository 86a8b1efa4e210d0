"""Describe an adapter file from its header: for `fewstep inspect` and for anyone who wonders."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.adapters.base_shapes import denoiser_shapes
from fewstep.adapters.coverage import Coverage
from fewstep.adapters.expert_tags import ExpertTag, expert_tags
from fewstep.adapters.families import KNOWN, guess_family
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.kinds import AdapterKind, AdapterParts, adapter_parts
from fewstep.adapters.modelspec import usage_hint
from fewstep.adapters.modules import LoraModule, other_tensors
from fewstep.adapters.names import shown
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.preflight import (
    alpha_problems,
    coverage_of,
    expert_problems,
    named_components,
)
from fewstep.adapters.rank_table import RankRow, rank_table, scale_problems
from fewstep.adapters.values import check_dtypes, check_values
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What a file says of itself.

    Attributes:
        path: The file.
        container: Whether it is safetensors or a pickle.
        num_bytes: Its size.
        kind: What kind of adapter it is (`kinds`).
        kind_text: The same for people, with the names of its experts.
        title: `modelspec.title`, if there.
        summary: The recipe in a few words; None without a recipe.
        recipe: The whole recipe; None without one.
        family: Base family.
        family_source: Whether the family is the recipe's word or guessed from names.
        naming: Dialects of the module names.
        dtypes: Of the tensors, safetensors' names.
        num_tensors: All tensors of the file.
        num_modules: LoRA pairs, text encoders included.
        text_encoder_modules: How many of them are for text encoders.
        ranks: The rank table, most modules first.
        components: Pipeline components that the names mention; () where they mention none.
        expert: Which phase expert it is; None where nothing says so.
        values_checked: Whether every number was looked at.
        coverage: Result against a base; None if not asked or if it does not fit.
        coverage_error: Why the adapter does not fit the base.
        errors: All that makes the file unusable, one sentence each, the above included.
        warnings: What will go wrong where; one sentence each.
    """

    path: Path
    container: Literal["safetensors", "pickle"]
    num_bytes: int
    kind: AdapterKind
    kind_text: str
    title: str | None
    summary: str | None
    recipe: FewStepRecipe | None
    family: str | None
    family_source: Literal["recipe", "guessed", "unknown"]
    naming: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_tensors: int
    num_modules: int
    text_encoder_modules: int
    ranks: tuple[RankRow, ...]
    components: tuple[str, ...]
    expert: ExpertTag | None
    values_checked: bool
    coverage: Coverage | None
    coverage_error: str | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        """A plain table for a terminal; text from the file is made harmless."""
        modules = str(self.num_modules)
        if self.text_encoder_modules:
            modules += f" ({self.text_encoder_modules} in text encoders)"
        rows = [
            ("file", str(self.path)),
            ("size", f"{self.num_bytes} bytes" + (", a pickle" * (self.container == "pickle"))),
            ("kind", self.kind_text),
            ("title", self.title or "-"),
            ("recipe", self.summary or "none"),
            ("family", f"{self.family or '?'} ({self.family_source})"),
            ("naming", ", ".join(self.naming) or "-"),
            ("dtype", ", ".join(self.dtypes) or "-"),
            ("tensors", str(self.num_tensors)),
            ("modules", modules),
            *(("rank", row.to_text()) for row in self.ranks),
        ]
        if self.components:
            rows.append(("for", ", ".join(self.components)))
        if self.expert is not None:
            rows.append(("expert", f"{self.expert.name} (known by {self.expert.known_by})"))
        if self.values_checked:
            rows.append(("values", "all finite" if self.num_tensors else "none"))
        if self.coverage is not None:
            rows.append(("coverage", f"{self.coverage.matched} of {self.coverage.modules} modules"))
        rows += [("error", text) for text in self.errors]
        rows += [("warning", text) for text in self.warnings]
        lines = [f"{name:<9} {_printable(value)}" for name, value in rows]
        if self.recipe is not None:
            lines += ["", self.recipe.to_json(indent=2)]
        return "\n".join(lines)


def inspect_adapter(
    path: Path | str, base: Path | str | None = None, *, values: bool = False
) -> AdapterReport:
    """Describe a LoRA file, and check it against a base if one is given.

    Args:
        path: The safetensors file, or a pickle of plain tensors.
        base: A diffusers folder: of a pipeline, or of its denoiser.
        values: Also look at every number for NaN and infinity; reads the whole file.

    Raises:
        AdapterError: The file or the base is damaged. That the two do not fit, or that the numbers
            are unusable, is not raised but reported, in `errors`.
        RecipeError: The file carries a recipe that is not valid.
    """
    header = open_adapter(path)
    parts = adapter_parts(header)
    modules = parts.modules()
    recipe = header.recipe()
    guess = guess_family(modules)
    family = guess if recipe is None else recipe.base.family
    coverage, coverage_error = None, None
    if base is not None:
        shapes = denoiser_shapes(Path(base))
        try:
            coverage = coverage_of(header, shapes)
        except AdapterError as error:
            coverage_error = str(error)
    errors = [_error_of(check_dtypes, header)] if modules else []
    values_error = _error_of(check_values, header) if values else None
    errors += [values_error, coverage_error]
    tags = expert_tags(header)
    return AdapterReport(
        path=header.path,
        container=header.container,
        num_bytes=header.num_bytes,
        kind=parts.kind,
        kind_text=parts.kind_text,
        title=header.metadata.get("modelspec.title"),
        summary=None if recipe is None else usage_hint(recipe),
        recipe=recipe,
        family=family,
        family_source="recipe" if recipe is not None else "guessed" if guess else "unknown",
        naming=tuple(sorted({module.name.dialect for module in modules})),
        dtypes=tuple(sorted({info.dtype for info in header.tensors.values()})),
        num_tensors=len(header.tensors),
        num_modules=len(modules),
        text_encoder_modules=sum(module.name.is_text_encoder for module in modules),
        ranks=rank_table(modules),
        components=named_components(header),
        expert=tags[0] if tags else None,
        values_checked=values and values_error is None,
        coverage=coverage,
        coverage_error=coverage_error,
        errors=tuple(error for error in errors if error is not None),
        warnings=(
            *_warnings(parts, modules, recipe, guess),
            *scale_problems(rank_table(modules)),
            *alpha_problems(header, modules),
            *expert_problems(tags),
        ),
    )


def _error_of(check: Callable[[AdapterHeader], None], header: AdapterHeader) -> str | None:
    try:
        check(header)
    except AdapterError as error:
        return str(error)
    return None


def _warnings(
    parts: AdapterParts,
    modules: Sequence[LoraModule],
    recipe: FewStepRecipe | None,
    guess: str | None,
) -> list[str]:
    found = []
    if not modules:
        found.append("no LoRA modules: this is not a LoRA file, or of a kind fewstep does not read")
    others = other_tensors(parts.lora)
    if modules and others:
        found.append(f"{len(others)} tensors are not plain LoRA, first: {shown(others[0])}")
    if parts.kind != "lora":
        found.append(
            "only FewStepPipeline applies this kind of adapter; stock diffusers and ComfyUI do not"
            + ("; fewstep convert --base --rank makes a LoRA of it" * (parts.kind == "lorad"))
        )
    if recipe is None:
        found.append("no recipe in the file: it does not say its steps, grid, sampler and guidance")
    elif guess in KNOWN and recipe.base.family in KNOWN and guess != recipe.base.family:
        found.append(f"the recipe says {recipe.base.family}, the module names look like {guess}")
    return found


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
