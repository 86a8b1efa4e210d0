"""Examining a lone adapter file: from its header alone, without a base; torch for pickles only."""

import warnings
from collections.abc import Callable
from pathlib import Path

from fewstep.adapters import AdapterHeader, adapter_parts, lora_modules
from fewstep.adapters.families import KNOWN, guess_family
from fewstep.adapters.opening import open_adapter
from fewstep.doctor.comfyui import COMFYUI_CHECKS, comfy_settings, lora_weight, runtime_levels
from fewstep.doctor.finding import Diagnosis, Finding, worst_first
from fewstep.doctor.lora_file import LORA_FILE_CHECKS
from fewstep.doctor.recipe import RECIPE_CHECKS
from fewstep.doctor.subject import AdapterFile, StockLoad, Subject
from fewstep.doctor.trained import trained_timesteps
from fewstep.errors import RecipeNotFoundError
from fewstep.model_files import find_adapter
from fewstep.recipe import FewStepRecipe, Grid
from fewstep.recipe_resolution import ResolvedRecipe, recipe_sources, resolve_recipe
from fewstep.zoo import likely_entries
from fewstep.zoo.matching import UNETS


def examine_adapter(
    adapter: Path | str,
    *,
    recipe: FewStepRecipe | Path | str | None = None,
    steps: int | None = None,
) -> Diagnosis:
    """Say what is wrong with an adapter file, as far as the file alone can tell.

    Args:
        adapter: A file, or a folder with one.
        recipe: In place of the one in the file.
        steps: Step count to show; None takes the recipe's default.

    Raises:
        AdapterError: The file is missing or damaged.
        RecipeError: A recipe is not valid, or is not for that step count.
    """
    found = find_adapter(adapter)
    header = open_adapter(found.path)
    sources = recipe_sources(argument=recipe, adapter=header, adapter_sidecar=found.sidecar)
    resolved, said = found_recipe(lambda: resolve_recipe(sources))
    chosen = None if resolved is None else resolved.recipe
    subject = Subject(
        recipe=chosen,
        recipe_source=None if resolved is None else resolved.source,
        recipe_places="" if said is None or chosen is not None else said,
        recipe_warning=said if chosen is not None else None,
        candidates=candidates_of(header) if chosen is None else (),
        num_steps=steps,
        files=(adapter_file(header, chosen),),
    )
    if chosen is not None:
        chosen.grid(steps)  # a step count it was not made for is the caller's mistake
    checks = (*RECIPE_CHECKS, *LORA_FILE_CHECKS, *COMFYUI_CHECKS)
    findings = [finding for check in checks if (finding := check.examine(subject)) is not None]
    return diagnosis_of(subject, f"adapter {header.path}", findings)


def found_recipe(
    resolve: Callable[[], ResolvedRecipe],
) -> tuple[ResolvedRecipe | None, str | None]:
    """A recipe and what was said of it; without one, where it was looked for.

    Raises:
        RecipeError: A source has a recipe that is not valid.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            resolved = resolve()
        except RecipeNotFoundError as error:
            return None, str(error)
    return resolved, str(said[0].message) if said else None


def adapter_file(
    header: AdapterHeader,
    recipe: FewStepRecipe | None,
    *,
    scale: float | None = None,
    stock: StockLoad | None = None,
) -> AdapterFile:
    """A file as the checks see it.

    Args:
        header: Of the file.
        recipe: In force.
        scale: The user's own; None takes the recipe's.
        stock: What stock diffusers made of it.
    """
    parts = adapter_parts(header)
    modules = lora_modules(parts.lora)  # what other hosts could apply; other kinds have a finding
    guess = guess_family(parts.modules())
    family = guess if recipe is None else _family(guess, recipe.base.family)
    wanted = 1.0 if recipe is None else recipe.lora.scale
    return AdapterFile(header, modules, family, wanted if scale is None else scale, stock)


def _family(guess: str | None, said: str) -> str:
    """What the recipe says, unless the names are plainly of another family."""
    if guess is None or not {guess, said} <= {*KNOWN} or {guess, said} <= UNETS:
        return said
    return guess


def candidates_of(header: AdapterHeader | None, base: str | None = None) -> tuple[str, ...]:
    """Names of zoo entries this may be."""
    return tuple(f"zoo:{entry.name}" for entry in likely_entries(header, base))


def diagnosis_of(subject: Subject, name: str, findings: list[Finding]) -> Diagnosis:
    """A subject and its findings, with what other hosts need."""
    recipe, grid = subject.recipe, subject.grid
    if recipe is None or grid is None:
        return Diagnosis(
            name, None, (), subject.as_called, subject.with_fewstep, worst_first(findings)
        )
    weight = lora_weight(recipe, subject.files[0] if subject.files else None)
    return Diagnosis(
        subject=name,
        recipe_source=subject.recipe_source,
        trained=_trained(subject, grid),
        as_called=subject.as_called,
        with_fewstep=subject.with_fewstep,
        findings=worst_first(findings),
        comfyui=comfy_settings(recipe, grid, weight=weight),
        runtime=runtime_levels(recipe, grid.num_steps),
    )


def _trained(subject: Subject, grid: Grid) -> tuple[tuple[float, float], ...]:
    """Grids that depend on the size are shown as they are for the size probed."""
    timesteps = trained_timesteps(subject)
    if timesteps != grid.timesteps:
        return tuple((t, t / subject.total) for t in timesteps)
    return tuple(zip(timesteps, grid.sigmas, strict=False))
