"""What a LoRA file says of itself, for people; its weights are never read. No ComfyUI here."""

from dataclasses import dataclass
from pathlib import Path

from fewstep.adapters import AdapterReport, inspect_adapter, open_adapter
from fewstep.comfy_nodes.lora_file import open_lora
from fewstep.errors import AdapterError, RecipeNotFoundError
from fewstep.recipe import FewStepRecipe
from fewstep.zoo import likely_entries
from fewstep.zoo.digests import fingerprint, head_digest

HASH_KEY = "modelspec.hash_sha256"


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """A file in words.

    Attributes:
        name: What to call it.
        recipe: Its own, or that of the zoo entry it is known as; None without either.
        rows: Label and text of everything but the recipe.
    """

    name: str
    recipe: FewStepRecipe | None
    rows: tuple[tuple[str, str], ...]


def lora_facts(path: Path) -> LoraFacts:
    """Describe a file from its header.

    Raises:
        AdapterError: It is damaged.
        RecipeError: It carries a recipe that is not valid.
    """
    report = inspect_adapter(path)
    recipe, name = report.recipe, report.title or path.name
    notes = [*report.errors, *report.warnings]
    if recipe is None:
        try:
            known = open_lora(path)
            recipe, name = known.recipe, known.title
            notes.append(known.note)
        except (AdapterError, RecipeNotFoundError) as error:
            notes += [str(error), *_hints(path)]
    return LoraFacts(name, recipe, (*_rows(report), *(("warning", text) for text in notes)))


def _rows(report: AdapterReport) -> list[tuple[str, str]]:
    header = open_adapter(report.path)
    rows = [
        ("file", f"{report.path.name}, {report.num_bytes / 1e6:.1f} MB"),
        ("kind", report.kind_text),
        ("names", f"{', '.join(report.naming) or '-'}, {report.num_modules} modules"),
        *(("rank", row.to_text()) for row in report.ranks),
        ("looks for", f"{report.family or '?'} ({report.family_source})"),
    ]
    if report.expert is not None:
        rows.append(("expert", f"{report.expert.name} (known by {report.expert.known_by})"))
    if HASH_KEY in header.metadata:
        rows.append(("sha256", f"{header.metadata[HASH_KEY]} (of the weights, as the file says)"))
    rows.append(("shapes", fingerprint(header)))
    rows.append(("head", head_digest(header)))
    return rows


def _hints(path: Path) -> list[str]:
    """Presets that may be meant."""
    names = [found.name for found in likely_entries(open_adapter(path))]
    return [f"it looks like {' or '.join(names)}"] if names else []
