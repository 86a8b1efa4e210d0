"""Which recipe applies: one order, in one place. No torch.

argument > adapter file > beside the adapter > beside the base > the pipeline's own scheduler.
The first source that has a recipe wins; a source that has a broken one is an error, never skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.adapters import AdapterHeader
from fewstep.errors import RecipeError, RecipeNotFoundError
from fewstep.recipe import METADATA_KEY, SIDECAR_NAME, FewStepRecipe


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """One place a recipe may come from.

    Attributes:
        name: For messages: what is looked at.
        read: The recipe, or None where there is none.
    """

    name: str
    read: Callable[[], FewStepRecipe | None]


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe and the name of the source that had it."""

    recipe: FewStepRecipe
    source: str


def recipe_sources(
    *,
    argument: FewStepRecipe | str | Path | None = None,
    adapter: AdapterHeader | None = None,
    adapter_sidecar: Path | None = None,
    base: str | Path | None = None,
    base_sidecar: Path | None = None,
    installed: FewStepRecipe | None = None,
) -> tuple[RecipeSource, ...]:
    """The order of resolution: the only place that knows it.

    Args:
        argument: What the caller passed, a recipe or the path of a JSON file.
        adapter: Header of the adapter file.
        adapter_sidecar: `fewstep_recipe.json` beside it, where there is one.
        base: Folder or name of the base model, for messages.
        base_sidecar: `fewstep_recipe.json` of the base, where there is one.
        installed: Recipe of a FewStepScheduler that the pipeline already has.
    """
    sources = []
    if argument is not None:
        sources.append(RecipeSource("the recipe argument", lambda: read_recipe(argument)))
    if adapter is not None:
        where = f"{METADATA_KEY!r} in the metadata of {adapter.path}"
        sources.append(RecipeSource(where, adapter.recipe))
        beside = adapter_sidecar or adapter.path.parent / SIDECAR_NAME
        sources.append(RecipeSource(str(beside), lambda: _read_if(adapter_sidecar)))
    if base is not None:
        sources.append(
            RecipeSource(
                str(base_sidecar or f"{base}/{SIDECAR_NAME}"), lambda: _read_if(base_sidecar)
            )
        )
    sources.append(RecipeSource("the pipeline's own scheduler", lambda: installed))
    return tuple(sources)


def resolve_recipe(sources: Sequence[RecipeSource]) -> ResolvedRecipe:
    """The recipe of the first source that has one.

    Raises:
        RecipeNotFoundError: None has; the message names what was looked at.
        RecipeError: A source has a recipe that is not valid.
    """
    for source in sources:
        recipe = source.read()
        if recipe is not None:
            return ResolvedRecipe(recipe, source.name)
    looked = "; ".join(source.name for source in sources)
    raise RecipeNotFoundError(
        f"nothing says how this model wants to be sampled (looked at: {looked}); "
        f"pass recipe=, or put {SIDECAR_NAME} beside the adapter"
    )


def read_recipe(recipe: FewStepRecipe | str | Path) -> FewStepRecipe:
    """A recipe as it is, or read from a JSON file.

    Raises:
        RecipeError: There is no such file, or it is not a recipe.
    """
    if isinstance(recipe, FewStepRecipe):
        return recipe
    path = Path(recipe)
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such recipe file; pass a FewStepRecipe or a path")
    return FewStepRecipe.from_file(path)


def _read_if(path: Path | None) -> FewStepRecipe | None:
    return None if path is None else FewStepRecipe.from_file(path)
