"""Put a few-step adapter on a MODEL: convert, patch, and count what was really patched."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import comfy.model_sampling  # pyright: ignore[reportMissingImports]

from fewstep.adapters.names import shown
from fewstep.comfy_nodes.base_check import base_problem, family_of
from fewstep.comfy_nodes.expert_patches import (
    ExpertPatches,
    ExpertSet,
    apply_patches,
    attach_experts,
    experts_of,
)
from fewstep.comfy_nodes.lora_file import (
    LoraFile,
    component_for,
    open_lora,
    phases_in,
)
from fewstep.comfy_nodes.lora_fit import Fit, fit_lora
from fewstep.comfy_nodes.model_recipe import attach, attached
from fewstep.comfy_nodes.recipe_limits import family_title
from fewstep.comfy_nodes.recipe_text import summary
from fewstep.comfy_nodes.sampling_limits import check_can_sample
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe

logger = logging.getLogger(__name__)
OnProblem = Literal["error", "warn"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter on a MODEL.

    Attributes:
        model: The MODEL with it; the one given where strength is 0.
        named: Its recipe.
        text: What was done, for the node; one line each.
    """

    model: Any
    named: NamedRecipe
    text: str


def load_few_step_lora(
    model: Any,
    path: Path,
    strength: float,
    *,
    expert: int | None = None,
    unmatched_keys: OnProblem = "error",
    base_check: OnProblem = "error",
) -> Loaded:
    """The MODEL with an adapter and its recipe; the MODEL given stays as it is.

    Args:
        model: A MODEL.
        path: The adapter file.
        strength: 1 is what its recipe says; 0 leaves the MODEL without adapter and recipe.
        expert: Index of the recipe's expert that the file is for; None asks the file.
        unmatched_keys: What to do where only a part of the adapter fits.
        base_check: What to do where the MODEL is of another family or prediction.

    Raises:
        AdapterError: The file cannot be used on this MODEL; see the message.
        RecipeError: Its recipe is not valid.
        RecipeNotFoundError: It has no recipe.
    """
    file = open_lora(path)
    named = NamedRecipe(file.recipe, file.name)
    lines = [file.note] if file.note else []
    if strength == 0.0:
        return Loaded(model, named, "\n".join(["strength 0: MODEL is unchanged.", *lines]))
    check_can_sample(file.recipe)
    phases = phases_in(file, expert)
    before = _experts_so_far(model, file, phases)
    if problem := base_problem(file.recipe, model):
        _complain(problem, base_check, lines)
    fits = {p: fit_lora(model, file, component_for(file, p)) for p in phases or (None,)}
    for fit in fits.values():
        _check_fit(model, file, fit, unmatched_keys, lines)
    patched, strength = model.clone(), strength * file.recipe.lora.scale
    shares_network = all(file.recipe.experts[phase].component is None for phase in phases)
    if phases and shares_network:
        waiting = dict(before.patches) if before else {}
        waiting |= {p: ExpertPatches(fits[p].groups, strength) for p in phases}
        experts = ExpertSet(_names_of(file), waiting)
    else:
        for fit in fits.values():
            apply_patches(patched, fit.groups, strength)
        experts = ExpertSet(_names_of(file), network=phases[0]) if phases else None
    if experts is not None:
        attach_experts(patched, experts)
        lines.append(_phase_text(experts, phases))
    set_shift(patched, file.recipe)
    attach(patched, named)
    return Loaded(patched, named, "\n".join([_summary(file, list(fits.values())), *lines]))


def set_shift(model: Any, recipe: FewStepRecipe) -> None:
    """Tell a flow MODEL (a clone the caller made) the shift its adapter was trained with.

    Nodes that think in percent of a run (ControlNet's start and end) then mean the right steps. The
    recipe's own sigmas are shifted already, and what the network is told for one does not change.
    """
    shift = recipe.base.schedule.shift
    if shift is None or recipe.resolution_shift is not None:
        return
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    count = len(sampling.sigmas) if _is_flow(sampling) else 0
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        sampling.set_parameters(shift=shift, timesteps=count, multiplier=sampling.multiplier)
    elif isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        sampling.set_parameters(shift=math.log(shift), timesteps=count)
    else:
        return
    model.add_object_patch("model_sampling", sampling)


def _is_flow(sampling: Any) -> bool:
    return isinstance(
        sampling,
        comfy.model_sampling.ModelSamplingDiscreteFlow | comfy.model_sampling.ModelSamplingFlux,
    )


def _experts_so_far(model: Any, file: LoraFile, phases: tuple[int, ...]) -> ExpertSet | None:
    """What MODEL carries already that this file completes; an error where it does not."""
    there = attached(model)
    if there is None:
        return None
    experts = experts_of(model)
    is_same = there.recipe == file.recipe and experts is not None and experts.network is None
    if not is_same or experts is None:
        raise AdapterError(
            f"MODEL carries the few-step adapter {there.name!r} already, and {file.name!r} would "
            "be a second one. Load one of the two."
        )
    for phase in phases:
        if phase in experts.patches:
            raise AdapterError(
                f"MODEL has an adapter for phase {experts.names[phase]!r} already, and "
                f"{file.name!r} is for it too. Load the file of another phase, or choose another "
                "expert."
            )
    return experts


def _check_fit(
    model: Any, file: LoraFile, fit: Fit, unmatched_keys: OnProblem, lines: list[str]
) -> None:
    if fit.text_layers:
        lines.append(
            f"{fit.text_layers} layers are for text encoders and not applied: load the file with "
            "the core LoRA loader at strength_model 0 for them."
        )
    if not fit.unmatched:
        return
    recipe_family = file.recipe.base.family
    if fit.matched == 0 and family_of(model) in (None, recipe_family):
        kind = type(model).__name__
        raise AdapterError(
            f"This loader's MODEL does not accept LoRA patches ({kind} of "
            f"{type(model.model).__name__} has none of the {fit.total} layers, first "
            f"{shown(fit.unmatched)}); use a fused export, or the checkpoint the adapter was made "
            "for."
        )
    problem = (
        f"Only {fit.matched} of {fit.total} adapter weights match this model (first unmatched: "
        f"{fit.unmatched[:100]}). A half-loaded few-step adapter gives blurred images. Load the "
        f"{family_title(recipe_family)} checkpoint it was trained on, or set unmatched_keys to "
        '"warn".'
    )
    _complain(problem, unmatched_keys, lines)


def _complain(problem: str, how: OnProblem, lines: list[str]) -> None:
    if how == "error":
        raise AdapterError(problem)
    logger.warning(problem)
    lines.append(f"Warning: {problem}")


def _names_of(file: LoraFile) -> tuple[str, ...]:
    return tuple(expert.adapter for expert in file.recipe.experts)


def _phase_text(experts: ExpertSet, phases: Sequence[int]) -> str:
    here = " and ".join(experts.names[phase] for phase in phases)
    if experts.network is not None:
        others = ", ".join(name for name in experts.names if name != here)
        return f"Phase {here}; the network of {others} is another MODEL, for model_2."
    if experts.missing:
        missing = ", ".join(experts.missing)
        return f"Phase {here}; load {missing} with another Few-Step LoRA Loader."
    return f"All {len(experts.names)} phases: {', '.join(experts.names)}."


def _summary(file: LoraFile, fits: Sequence[Fit]) -> str:
    matched, total = (
        sum(count) for count in zip(*((f.matched, f.total) for f in fits), strict=True)
    )
    return f"{summary(file.recipe, file.title)} · {matched}/{total} weights"
