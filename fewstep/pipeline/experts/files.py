"""Which adapter files there are, and which expert of the recipe each is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.adapters import AdapterHeader
from fewstep.adapters.expert_tags import HIGH, LOW, expert_tag
from fewstep.adapters.header import PICKLE_SUFFIXES
from fewstep.adapters.kinds import adapter_parts
from fewstep.adapters.opening import open_adapter
from fewstep.errors import AdapterError, PipelineError
from fewstep.model_files import SUFFIX, AdapterFile, adapters_among, find_adapter, listed
from fewstep.pipeline.experts.tags import experts_in
from fewstep.recipe import FewStepRecipe

AdapterSource = str | Path | Mapping[str, str | Path]
"""One file, folder or hub name; or several, by the name of their expert."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One adapter file.

    Attributes:
        file: Where it lies.
        header: What it says of itself.
        label: The expert it was passed for; None where only the file can tell.
    """

    file: AdapterFile
    header: AdapterHeader
    label: str | None = None


@dataclass(frozen=True, slots=True)
class AssignedFile:
    """A file and what it is for.

    Attributes:
        header: The file.
        expert: Index of the recipe's expert or route; None without.
        name: The expert's name.
        component: The denoiser it changes; None means the pipeline's own.
    """

    header: AdapterHeader
    expert: int | None = None
    name: str | None = None
    component: str | None = None


def find_files(
    adapter: AdapterSource, hub_options: Mapping[str, Any] | None = None
) -> tuple[FoundFile, ...]:
    """Every adapter file that a user's `adapter=` names, their headers read.

    Args:
        adapter: A file, a folder or a hub name as `find_adapter` takes it, but with one or more
            files; "owner/name/folder" is a folder of a hub repository; or a mapping from expert
            names to those.
        hub_options: As `find_adapter`.

    Raises:
        AdapterError: Something named is not there, or a file is damaged.
    """
    hub = dict(hub_options or {})
    if isinstance(adapter, Mapping):
        if not adapter:
            raise AdapterError("adapter is an empty mapping; give expert names and their files")
        return tuple(_found(find_adapter(path, hub), name) for name, path in adapter.items())
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        there = adapters_among(path.name for path in folder.iterdir() if path.is_file())
        if len(there) > 1:
            return tuple(_found(find_adapter(folder / name)) for name in there)
    names = [] if folder.exists() else _files_of_repository(str(adapter), hub)
    if len(names) > 1:
        _check_is_pair(str(adapter), names)  # before anything is downloaded
        return tuple(_found(find_adapter(name, hub)) for name in names)
    return (_found(find_adapter(names[0] if names else adapter, hub)),)


def recipe_file(files: Sequence[FoundFile]) -> FoundFile:
    """The file that speaks for all: the first that carries a recipe, else the first.

    Raises:
        AdapterError: Two files carry recipes that differ.
        RecipeError: A file carries one that is not valid.
    """
    carriers = [(found, found.header.recipe()) for found in files]
    carriers = [(found, recipe) for found, recipe in carriers if recipe is not None]
    for found, recipe in carriers[1:]:
        if recipe != carriers[0][1]:
            raise AdapterError(
                f"{carriers[0][0].header.path} and {found.header.path} carry different recipes; "
                "name the files that belong together"
            )
    return carriers[0][0] if carriers else files[0]


def assign_files(recipe: FewStepRecipe, files: Sequence[FoundFile]) -> tuple[AssignedFile, ...]:
    """Each file's expert (or route), in the order of the recipe.

    A file is for the expert it was passed for, else for the one its metadata, its modules'
    component or its name says; a file with modules for several networks serves all of them.

    Raises:
        AdapterError: An expert has no file or two, or a file cannot be placed.
    """
    if recipe.routes:
        return _assign_routes(recipe, _only(files).header)
    if not recipe.experts:
        return (AssignedFile(_only(files).header),)
    names = [expert.adapter for expert in recipe.experts]
    for name in names:
        if names.count(name) > 1:
            raise AdapterError(
                f"two experts of this recipe are called {name!r}; give each a name of its own"
            )
    chosen: dict[int, FoundFile] = {}
    for found in files:
        for index in _experts_of(recipe, found):
            if index in chosen:
                raise AdapterError(
                    f"{chosen[index].header.path} and {found.header.path} are both for expert "
                    f"{recipe.experts[index].adapter!r}; "
                    'pass adapter={"' + recipe.experts[index].adapter + '": path, ...}'
                )
            chosen[index] = found
    missing = [e.adapter for i, e in enumerate(recipe.experts) if i not in chosen]
    if missing:
        raise AdapterError(
            f"no file for expert {missing[0]!r} among "
            f"{', '.join(found.header.path.name for found in files)}; "
            'pass adapter={"' + missing[0] + '": path, ...}'
        )
    return tuple(
        AssignedFile(chosen[i].header, i, expert.adapter, expert.component)
        for i, expert in enumerate(recipe.experts)
    )


def _assign_routes(recipe: FewStepRecipe, header: AdapterHeader) -> tuple[AssignedFile, ...]:
    """All experts of routes are in one file, told apart by a prefix."""
    wanted = [route.adapter for route in recipe.routes]
    found = adapter_parts(header).routes
    if sorted(found) != sorted(wanted):
        there = f"experts {', '.join(sorted(found))}" if found else "no expert of any route"
        raise AdapterError(
            f"{header.path}: holds {there}, but this recipe routes prompts to "
            f"{', '.join(wanted)}; use the file that the recipe was made for"
        )
    return tuple(AssignedFile(found[name], i, name) for i, name in enumerate(wanted))


def check_no_file_is_needed(recipe: FewStepRecipe) -> None:
    """Refuse to sample experts of one network, or a network with a head, without their files.

    Experts with a network each may already be merged into them.

    Raises:
        PipelineError: They share a network.
    """
    if recipe.routes:
        names = " and ".join(repr(route.adapter) for route in recipe.routes)
        raise PipelineError(
            f"this recipe routes prompts to {names}; pass adapter= with the file that has them"
        )
    if recipe.sampler.kind == "flow_map":
        raise PipelineError(
            "this recipe's sampler is 'flow_map', whose network is told where each step ends, but "
            "there is no adapter with a two-time head to tell it; pass adapter= with the file that "
            "has one, or sample it with the pipeline of its authors"
        )
    if recipe.sampler.kind == "policy":
        raise PipelineError(
            "this recipe's sampler is 'policy', whose network has a wider output layer, but there "
            "is no adapter with a policy head; pass adapter= with the file that has one, or sample "
            "it with the pipeline of its authors"
        )
    components = [expert.component for expert in recipe.experts]
    if len(set(components)) < len(components):
        names = " and ".join(repr(expert.adapter) for expert in recipe.experts)
        raise PipelineError(
            f"this recipe needs the adapters of its experts {names}; pass adapter= with a folder "
            "that has them, or a mapping from these names to files"
        )


def _found(file: AdapterFile, label: str | None = None) -> FoundFile:
    return FoundFile(file, open_adapter(file.path), label)


def _only(files: Sequence[FoundFile]) -> FoundFile:
    if len(files) == 1 and files[0].label is None:
        return files[0]
    if len(files) == 1 or files[0].label is not None:
        raise AdapterError(
            f"adapter names {', '.join(repr(found.label) for found in files)}, but this recipe has "
            "no experts; pass one file"
        )
    raise AdapterError(
        f"{files[0].header.path.parent}: {listed([found.header.path.name for found in files])}, "
        "but this recipe has no experts; name the one you mean"
    )


def _experts_of(recipe: FewStepRecipe, found: FoundFile) -> Sequence[int]:
    names = [expert.adapter for expert in recipe.experts]
    if found.label is not None:
        if found.label not in names:
            raise AdapterError(
                f"adapter names expert {found.label!r}, but this recipe's experts are "
                f"{', '.join(map(repr, names))}"
            )
        return [names.index(found.label)]
    return experts_in(recipe, found.header)


def _files_of_repository(name: str, hub: dict[str, Any]) -> list[str]:
    """Names of a hub repository's adapter files, or of those in one of its folders."""
    parts = name.split("/")
    if (
        name.endswith((SUFFIX, *PICKLE_SUFFIXES))
        or len(parts) < 2
        or "\\" in name
        or "" in parts
        or "." in parts
    ):
        return []
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    known = _listed(repository, hub)
    in_folder = [file for file in known if file.rpartition("/")[0] == folder]
    return [f"{repository}/{file}" for file in adapters_among(in_folder)]


def _check_is_pair(where: str, names: Sequence[str]) -> None:
    hints = [expert_tag(AdapterHeader(Path(name), 0, {}, {})) for name in names]
    if len(names) == 2 and {None if hint is None else hint.name for hint in hints} == {HIGH, LOW}:
        return
    raise AdapterError(
        f"{where}: {listed([name.rpartition('/')[2] for name in names])}; name the one you mean, "
        "or pass a mapping from expert names to files"
    )


def _listed(repository: str, hub: Mapping[str, Any]) -> list[str]:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if hub.get("local_files_only"):
            folder = Path(snapshot_download(repository, **hub))
            return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return list_repo_files(repository, revision=hub.get("revision"), token=hub.get("token"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
        return []  # `find_adapter` says what is wrong
