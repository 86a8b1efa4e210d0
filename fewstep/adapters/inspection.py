"""Describe an adapter file from its header: for `fewstep inspect` and for anyone who wonders."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.adapters.base_shapes import denoiser_shapes
from fewstep.adapters.coverage import Coverage, check_coverage
from fewstep.adapters.families import KNOWN, guess_family
from fewstep.adapters.header import AdapterHeader, read_header
from fewstep.adapters.modelspec import usage_hint
from fewstep.adapters.modules import LoraModule, lora_metadata, lora_modules, other_tensors
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe


@dataclass(frozen=True, slots=True)
class RankRow:
    """How many modules share a rank and an alpha.

    Attributes:
        rank: Inner size.
        alpha: None where the file says nothing; readers then take the rank.
        modules: How many.
    """

    rank: int
    alpha: float | None
    modules: int

    @property
    def scale(self) -> float:
        """alpha / rank: what multiplies up @ down."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What a file says of itself.

    Attributes:
        path: The file.
        num_bytes: Its size.
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
        coverage: Result against a base; None if not asked or if it does not fit.
        coverage_error: Why the adapter does not fit the base.
        warnings: What will go wrong where; one sentence each.
    """

    path: Path
    num_bytes: int
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
    coverage: Coverage | None
    coverage_error: str | None
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
            ("size", f"{self.num_bytes} bytes"),
            ("title", self.title or "-"),
            ("recipe", self.summary or "none"),
            ("family", f"{self.family or '?'} ({self.family_source})"),
            ("naming", ", ".join(self.naming) or "-"),
            ("dtype", ", ".join(self.dtypes) or "-"),
            ("tensors", str(self.num_tensors)),
            ("modules", modules),
            *(("rank", _rank_text(row)) for row in self.ranks),
        ]
        if self.coverage is not None:
            rows.append(("coverage", f"{self.coverage.matched} of {self.coverage.modules} modules"))
        if self.coverage_error is not None:
            rows.append(("coverage", self.coverage_error))
        rows += [("warning", text) for text in self.warnings]
        lines = [f"{name:<9} {_printable(value)}" for name, value in rows]
        if self.recipe is not None:
            lines += ["", self.recipe.to_json(indent=2)]
        return "\n".join(lines)


def inspect_adapter(path: Path | str, base: Path | str | None = None) -> AdapterReport:
    """Describe a LoRA file, and check it against a base if one is given.

    Args:
        path: The safetensors file.
        base: A diffusers folder: of a pipeline, or of its denoiser.

    Raises:
        AdapterError: The file or the base is damaged. That the two do not fit is not raised but
            reported, in `coverage_error`.
        RecipeError: The file carries a recipe that is not valid.
    """
    header = read_header(path)
    modules = lora_modules(header)
    recipe = header.recipe()
    guess = guess_family(modules)
    family = guess if recipe is None else recipe.base.family
    coverage, coverage_error = None, None
    if base is not None:
        shapes = denoiser_shapes(Path(base))
        try:
            coverage = check_coverage(header, shapes)
        except AdapterError as error:
            coverage_error = str(error)
    return AdapterReport(
        path=header.path,
        num_bytes=header.num_bytes,
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
        ranks=_rank_table(modules),
        coverage=coverage,
        coverage_error=coverage_error,
        warnings=tuple(_warnings(header, modules, recipe, guess)),
    )


def _rank_table(modules: Sequence[LoraModule]) -> tuple[RankRow, ...]:
    counts = Counter((module.rank, module.alpha) for module in modules)
    return tuple(RankRow(rank, alpha, count) for (rank, alpha), count in counts.most_common())


def _rank_text(row: RankRow) -> str:
    alpha = "alpha not stored (read as the rank)" if row.alpha is None else f"alpha {row.alpha:g}"
    return f"{row.rank}, {alpha}, scale {row.scale:g}: {row.modules} modules"


def _warnings(
    header: AdapterHeader,
    modules: Sequence[LoraModule],
    recipe: FewStepRecipe | None,
    guess: str | None,
) -> list[str]:
    found = []
    if not modules:
        found.append("no LoRA modules: this is not a LoRA file, or of a kind fewstep does not read")
    others = other_tensors(header)
    if modules and others:
        found.append(f"{len(others)} tensors are not plain LoRA, first: {shown(others[0])}")
    if recipe is None:
        found.append("no recipe: steps, grid, sampler and guidance must be set by hand")
    elif guess in KNOWN and recipe.base.family in KNOWN and guess != recipe.base.family:
        found.append(f"the recipe says {recipe.base.family}, the module names look like {guess}")
    has_tensors = any(name.endswith(".alpha") for name in header.tensors)
    if has_tensors and lora_metadata(header):
        found.append("alpha is in tensors and in lora_adapter_metadata: diffusers refuses both")
    if not has_tensors and any(m.alpha not in (None, m.rank) for m in modules):
        found.append(
            "alpha differs from rank and is only in lora_adapter_metadata: ComfyUI does not read "
            "it and applies scale 1"
        )
    return found


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
