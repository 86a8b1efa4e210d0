"""Recipes that published pipelines carry in their own configs, under names of their own.

    distilled_sigmas   Cosmos3: the step count is fixed, guidance is off
    sample_sigmas      Qwen-Image 2.1 Turbo
    is_distilled       FLUX.2-klein (4 steps), Krea 2 Turbo (8 steps, mu = 1.15)

The sigmas are shifted by the pipeline's FlowMatchEulerDiscreteScheduler, so its config is needed
too. Read in diffusers 0.42.1; no checkpoint of these was at hand to compare pictures with.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import RecipeError
from fewstep.noise_schedule import shift_sigma
from fewstep.pipeline.families import families_of
from fewstep.recipe import (
    Base,
    FewStepRecipe,
    Grid,
    Provenance,
    ResolutionShift,
    Schedule,
)
from fewstep.recipe_resolution import ResolvedRecipe

SIGMAS = ("distilled_sigmas", "sample_sigmas")
KREA_SHIFT = math.exp(1.15)
INDEXES = ("modular_model_index.json", "model_index.json")


def recipe_from_config(
    class_name: str, config: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> FewStepRecipe | None:
    """The recipe in a pipeline's config.

    Args:
        class_name: The pipeline class, classic or modular.
        config: `model_index.json` or `modular_model_index.json`.
        scheduler: Config of its scheduler; empty where it is not known.

    Returns:
        None where the config says nothing of few steps.

    Raises:
        RecipeError: It does, but in a way a recipe cannot hold.
    """
    for name in SIGMAS:
        if config.get(name):
            return _from_sigmas(class_name, config[name], scheduler, f"config {name}")
    if not config.get("is_distilled"):
        return None
    if class_name.startswith("Flux2Klein"):
        shift = ResolutionShift(rule="flux2_empirical")
        return _recipe("flux2", _even(4), "config is_distilled", shift)
    if class_name.startswith("Krea2"):
        sigmas = [shift_sigma(u, KREA_SHIFT) for u in _even(8)]
        return _recipe("krea2", sigmas, "config is_distilled")
    return None


def recipe_of_pipeline(pipe: Any) -> ResolvedRecipe | None:
    """The recipe in the config of a loaded pipeline, and where it was found."""
    scheduler = pipe.components.get("scheduler")
    config = {} if scheduler is None else dict(scheduler.config)
    recipe = recipe_from_config(type(pipe).__name__, dict(pipe.config), config)
    return None if recipe is None else ResolvedRecipe(recipe, "the pipeline's own config")


def recipe_of_folder(folder: str | Path) -> ResolvedRecipe | None:
    """The recipe in the config of a saved pipeline, before any weight is loaded.

    Args:
        folder: A local folder; anything else (a hub name) gives None.
    """
    for name in INDEXES:
        index = Path(folder) / name
        if not index.is_file():
            continue
        config = _read(index)
        scheduler = _read(Path(folder) / "scheduler" / "scheduler_config.json")
        recipe = recipe_from_config(str(config.get("_class_name", "")), config, scheduler)
        if recipe is not None:
            return ResolvedRecipe(recipe, str(index))
    return None


def _from_sigmas(
    class_name: str, sigmas: object, scheduler: Mapping[str, Any], source: str
) -> FewStepRecipe:
    if not isinstance(sigmas, Sequence) or not all(isinstance(s, int | float) for s in sigmas):
        raise RecipeError(f"{source} is {sigmas!r}; wanted a list of numbers")
    if scheduler.get("shift_terminal") is not None:
        raise RecipeError(
            f"{source} is beside a scheduler that stretches its grid (shift_terminal); pass a "
            "recipe with the final sigmas"
        )
    family = (families_of(class_name) or (class_name.removesuffix("Pipeline").lower(),))[0]
    values = [float(s) for s in sigmas]
    values = values[:-1] if values[-1] == 0.0 else values
    if scheduler.get("use_dynamic_shifting"):
        return _recipe(family, values, source, _interpolated(scheduler))
    shift = float(scheduler.get("shift", 1.0))
    return _recipe(family, [shift_sigma(s, shift) for s in values], source)


def _interpolated(scheduler: Mapping[str, Any]) -> ResolutionShift:
    linear = scheduler.get("time_shift_type", "exponential") == "linear"
    return ResolutionShift(
        base_shift=float(scheduler.get("base_shift", 0.5)),
        max_shift=float(scheduler.get("max_shift", 1.15)),
        base_tokens=int(scheduler.get("base_image_seq_len", 256)),
        max_tokens=int(scheduler.get("max_image_seq_len", 4096)),
        kind="linear" if linear else "exponential",
    )


def _recipe(
    family: str, sigmas: Sequence[float], source: str, shift: ResolutionShift | None = None
) -> FewStepRecipe:
    grid = Grid(timesteps=tuple(1000.0 * s for s in sigmas), sigmas=(*sigmas, 0.0))
    return FewStepRecipe(
        base=Base(family=family, prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
        grids=(grid,),
        default_steps=grid.num_steps,
        resolution_shift=shift,
        provenance=Provenance(source=source),
    )


def _even(count: int) -> list[float]:
    return [1.0 - i / count for i in range(count)]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads the pipeline will say what is wrong with it
    return found if isinstance(found, dict) else {}
