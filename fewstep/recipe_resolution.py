"""Which recipe applies: one order, in one place. No torch.

argument > adapter file > beside the adapter > beside the base > the pipeline's own scheduler
> the zoo, by where the files come from > the zoo, by what they hold > an error with candidates.
The first source that has a recipe wins; a source that has a broken one is an error, never skipped.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.adapters import AdapterHeader
from fewstep.errors import RecipeError, RecipeNotFoundError
from fewstep.recipe import METADATA_KEY, SIDECAR_NAME, FewStepRecipe
from fewstep.zoo import ZooEntry, ZooMatch, entry, likely_entries, match_adapter, match_base
from fewstep.zoo.entry import VERIFICATION_TEXT

ZOO_PREFIX = "zoo:"
USER = 7
"""Stack depth of whoever called `wrap` or `from_pretrained`, for warnings."""


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe and the name of the source that had it."""

    recipe: FewStepRecipe
    source: str


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """One place a recipe may come from.

    Attributes:
        name: For messages: what is looked at.
        read: The recipe, or None where there is none. A source that knows more precisely where it
            found it gives a `ResolvedRecipe`.
        likely: Entries of the zoo that it may be, looked up when no source has any.
        beside: What a recipe file may be put beside, where one would be read here.
    """

    name: str
    read: Callable[[], FewStepRecipe | ResolvedRecipe | None]
    likely: Callable[[], Sequence[ZooEntry]] = lambda: ()
    beside: str | None = None


def recipe_sources(
    *,
    argument: FewStepRecipe | str | Path | None = None,
    adapter: AdapterHeader | None = None,
    adapter_sidecar: Path | None = None,
    base: str | Path | None = None,
    base_sidecar: Path | None = None,
    installed: FewStepRecipe | Callable[[], ResolvedRecipe | None] | None = None,
) -> tuple[RecipeSource, ...]:
    """The order of resolution: the only place that knows it.

    Args:
        argument: What the caller passed: a recipe, the path of a JSON file, or "zoo:NAME".
        adapter: Header of the adapter file.
        adapter_sidecar: `fewstep_recipe.json` beside it, where there is one.
        base: Folder or name of the base model; the zoo knows some by their name.
        base_sidecar: `fewstep_recipe.json` of the base, where there is one.
        installed: Recipe of a FewStepScheduler that the pipeline already has, or what looks into
            its config, where nothing before has one.
    """
    sources = []
    if argument is not None:
        sources.append(RecipeSource("the recipe argument", lambda: _read_argument(argument)))
    if adapter is not None:
        where = f"{METADATA_KEY!r} in the metadata of {adapter.path}"
        sources.append(RecipeSource(where, adapter.recipe))
        beside = adapter_sidecar or adapter.path.parent / SIDECAR_NAME
        sources.append(
            RecipeSource(str(beside), lambda: _read_if(adapter_sidecar), beside="the adapter")
        )
    if base is not None:
        where = str(base_sidecar or f"{base}/{SIDECAR_NAME}")
        sources.append(RecipeSource(where, lambda: _read_if(base_sidecar), beside="the base"))
    read_installed = installed if callable(installed) else lambda: installed
    sources.append(RecipeSource("the pipeline's own scheduler", read_installed))
    if adapter is not None or base is not None:
        sources.append(
            RecipeSource(
                "the zoo", lambda: _from_zoo(adapter, base), lambda: likely_entries(adapter, base)
            )
        )
    return tuple(sources)


def resolve_recipe(sources: Sequence[RecipeSource]) -> ResolvedRecipe:
    """The recipe of the first source that has one.

    Raises:
        RecipeNotFoundError: None has; the message names what was looked at, and the zoo's entries
            that look similar.
        RecipeError: A source has a recipe that is not valid, or that fewstep cannot sample by.
    """
    for source in sources:
        found = source.read()
        if isinstance(found, ResolvedRecipe):
            return found
        if found is not None:
            return ResolvedRecipe(found, source.name)
    looked = "; ".join(source.name for source in sources)
    said = f"nothing says how this model wants to be sampled (looked at: {looked}); "
    likely = [found for source in sources for found in source.likely()]
    places = [source.beside for source in sources if source.beside is not None]
    raise RecipeNotFoundError(
        said + _advice(likely, places, "pass recipe={}"),
        said + _advice(likely, places, "give --recipe {}"),
    )


def read_recipe(recipe: FewStepRecipe | str | Path) -> FewStepRecipe:
    """A recipe as it is, read from a JSON file, or of the zoo ("zoo:NAME").

    Raises:
        RecipeError: There is no such file or entry, it is not a recipe, or fewstep cannot sample
            by it.
    """
    found = _read_argument(recipe)
    return found.recipe if isinstance(found, ResolvedRecipe) else found


def _read_argument(recipe: FewStepRecipe | str | Path) -> FewStepRecipe | ResolvedRecipe:
    if isinstance(recipe, FewStepRecipe):
        return recipe
    if str(recipe).startswith(ZOO_PREFIX):
        return _of_entry(entry(str(recipe)), "the recipe argument")
    path = Path(recipe)
    if not path.is_file():
        raise RecipeError(
            f'{path}: there is no such recipe file; give the path of one, or "zoo:NAME"'
        )
    return FewStepRecipe.from_file(path)


def _read_if(path: Path | None) -> FewStepRecipe | None:
    return None if path is None else FewStepRecipe.from_file(path)


def _from_zoo(adapter: AdapterHeader | None, base: str | Path | None) -> ResolvedRecipe | None:
    match = None if adapter is None else match_adapter(adapter)
    if match is None and base is not None:
        match = match_base(base)
    if match is None:
        return None
    resolved = _of_entry(match.entry, f"found by {match.how}")
    if match.how == "file name":
        _warn_of_name(match)
    return resolved


def _of_entry(found: ZooEntry, how: str) -> ResolvedRecipe:
    recipe = found.required_recipe()
    if not found.is_verified:
        warnings.warn(
            f"the recipe {ZOO_PREFIX}{found.name} is unverified, "
            f"{VERIFICATION_TEXT[found.verification]}; compare it with {found.sources[0]}",
            stacklevel=USER,
        )
    return ResolvedRecipe(recipe, f"{ZOO_PREFIX}{found.name} ({how})")


def _warn_of_name(match: ZooMatch) -> None:
    name = f"{ZOO_PREFIX}{match.entry.name}"
    warnings.warn(
        f"this adapter was taken for {match.file.repo} by its file name alone; "
        f"pass recipe={name!r} to say so, or another recipe if it is not",
        stacklevel=USER,
    )


def _advice(likely: Sequence[ZooEntry], places: Sequence[str], how: str) -> str:
    """What to do; `how` is the caller's way to name a recipe."""
    if likely:
        names = [f"{ZOO_PREFIX}{found.name}" for found in likely]
        return f"it looks like {' or '.join(names)}; if it is, {how.format(repr(names[0]))}"
    place = places[0] if places else "the adapter"
    return f"{how.format('').strip()}, or put {SIDECAR_NAME} beside {place}"
