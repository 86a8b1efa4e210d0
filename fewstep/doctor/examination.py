"""Examining a pipeline: probe it as called and under its recipe, then ask every check."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from diffusers import DiffusionPipeline

from fewstep.doctor.adapter import ADAPTER_CHECKS
from fewstep.doctor.adapter_file import adapter_file, candidates_of, diagnosis_of, found_recipe
from fewstep.doctor.comfyui import COMFYUI_CHECKS
from fewstep.doctor.dtype import DTYPE_CHECKS
from fewstep.doctor.facts import fused_names, guidance_facts, networks_of, scheduler_facts, vae_of
from fewstep.doctor.finding import Diagnosis
from fewstep.doctor.grid import GRID_CHECKS
from fewstep.doctor.guidance import GUIDANCE_CHECKS
from fewstep.doctor.lora_file import LORA_FILE_CHECKS
from fewstep.doctor.noise import NOISE_CHECKS
from fewstep.doctor.probe import probe
from fewstep.doctor.recipe import RECIPE_CHECKS
from fewstep.doctor.sampler import SAMPLER_CHECKS
from fewstep.doctor.saving import SAVING_CHECKS
from fewstep.doctor.seen import SeenRun
from fewstep.doctor.stock_load import try_stock_load
from fewstep.doctor.subject import Check, Subject
from fewstep.errors import AdapterError, PipelineError, RecipeError
from fewstep.model_files import find_base_sidecar
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.experts.files import AdapterSource, FoundFile, find_files
from fewstep.pipeline.few_step_class import stock_class
from fewstep.pipeline.guidance import translate_guidance
from fewstep.pipeline.wrapping import resolve
from fewstep.recipe_resolution import ResolvedRecipe
from fewstep.schedulers import FewStepScheduler

CHECKS: tuple[Check, ...] = (
    *RECIPE_CHECKS,
    *LORA_FILE_CHECKS,
    *ADAPTER_CHECKS,
    *GRID_CHECKS,
    *SAMPLER_CHECKS,
    *GUIDANCE_CHECKS,
    *NOISE_CHECKS,
    *DTYPE_CHECKS,
    *SAVING_CHECKS,
    *COMFYUI_CHECKS,
)
"""Everything the doctor looks for, in the order of findings of one severity."""
OWNED_BY_THE_RECIPE = (
    *("num_inference_steps", "timesteps", "sigmas", "eta", "original_inference_steps"),
    *("guidance_scale", "guidance_scale_2", "true_cfg_scale", "distilled_guidance_scale"),
)
"""Arguments that a FewStepPipeline is called without."""


def examine(
    pipe: DiffusionPipeline,
    *,
    recipe: Any = None,
    adapter: AdapterSource | None = None,
    adapter_scale: float | None = None,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Say what is wrong with a pipeline, an adapter for it, and the way it is called.

    The pipeline is run as called and under its recipe, twice each and up to ten steps; the
    networks run as they are, but the samples are those of data that are all zeros (`probe`). It is
    put back as it was.

    Args:
        pipe: A stock pipeline, with or without LoRA on it, or a FewStepPipeline.
        recipe: A recipe or the path of one; None looks where FewStepPipeline looks.
        adapter: The few-step LoRA that is to be used, as `FewStepPipeline.wrap` takes it.
        adapter_scale: The weight that is to be used; None takes the recipe's.
        steps: Step count of the call; None takes the recipe's, else the class's default.
        arguments: The rest of the call as a user makes it: prompt or prompt_embeds, size,
            guidance_scale, ...

    Raises:
        AdapterError: An adapter file is missing or damaged.
        RecipeError: A recipe is not valid.
    """
    files = () if adapter is None else find_files(adapter)
    resolved, said = _recipe_of(pipe, recipe, files)
    given = dict(arguments or {})
    wanted = _wanted_steps(resolved, steps)
    if steps is not None or (wanted is not None and given.get("num_inference_steps") is None):
        given["num_inference_steps"] = wanted
    as_called = probe(pipe, given)
    ours, refusal, unfit = _probe_ours(pipe, resolved, adapter, adapter_scale, steps, given)
    known = None if resolved is None else resolved.recipe
    stock: Any = stock_class(pipe) if isinstance(pipe, FewStepPipeline) else type(pipe)
    subject = Subject(
        class_name=stock.__name__,
        recipe=known,
        recipe_source=None if resolved is None else resolved.source,
        recipe_places="" if said is None or resolved is not None else said,
        recipe_warning=said if resolved is not None else None,
        candidates=() if known is not None else _candidates(pipe, files),
        num_steps=given.get("num_inference_steps"),
        arguments=_plain(given),
        networks=networks_of(pipe),
        vae=vae_of(pipe),
        scheduler=scheduler_facts(cast(Any, pipe).scheduler),
        guidance=guidance_facts(stock, _filled(pipe, stock, given), known),
        fused=fused_names(pipe),
        is_wrapped=isinstance(pipe, FewStepPipeline),
        as_called=as_called,
        with_fewstep=ours,
        refusal=refusal,
        unfit=unfit,
        files=tuple(
            adapter_file(
                found.header, known, scale=adapter_scale, stock=try_stock_load(pipe, found.header)
            )
            for found in files
        ),
    )
    findings = [finding for check in CHECKS if (finding := check.examine(subject)) is not None]
    return diagnosis_of(subject, stock.__name__, findings)


def _recipe_of(
    pipe: Any, recipe: Any, files: Sequence[FoundFile]
) -> tuple[ResolvedRecipe | None, str | None]:
    """What applies and what was said of it, or where it was looked for in vain."""
    if isinstance(pipe, FewStepPipeline) and recipe is None and not files:
        return ResolvedRecipe(pipe.recipe, "the FewStepPipeline"), None
    origin = pipe.config.get("_name_or_path")
    sidecar = find_base_sidecar(origin, {"local_files_only": True}) if origin else None
    scheduler = pipe.components.get("scheduler")
    installed = scheduler.recipe if isinstance(scheduler, FewStepScheduler) else None
    return found_recipe(lambda: resolve(recipe, files, origin, sidecar, installed))


def _wanted_steps(resolved: ResolvedRecipe | None, steps: int | None) -> int | None:
    if steps is not None or resolved is None:
        return steps
    return resolved.recipe.default_steps


def _candidates(pipe: Any, files: Sequence[FoundFile]) -> tuple[str, ...]:
    origin = pipe.config.get("_name_or_path")
    return candidates_of(files[0].header if files else None, origin)


def _probe_ours(
    pipe: Any,
    resolved: ResolvedRecipe | None,
    adapter: AdapterSource | None,
    scale: float | None,
    steps: int | None,
    given: Mapping[str, Any],
) -> tuple[SeenRun | None, str | None, str | None]:
    """What was seen under the recipe, else why not: the recipe, or the adapter."""
    if resolved is None:
        return None, None, None
    arguments = {k: v for k, v in given.items() if k not in OWNED_BY_THE_RECIPE}
    if isinstance(pipe, FewStepPipeline):
        run = probe(pipe, arguments | ({} if steps is None else {"num_inference_steps": steps}))
        return _judged(run)
    try:
        wrapped = FewStepPipeline.wrap(
            pipe, recipe=resolved.recipe, adapter=adapter, steps=steps, adapter_scale=scale
        )
    except (PipelineError, RecipeError) as error:
        return None, str(error), None
    except AdapterError as error:
        return None, None, str(error)
    try:
        run = probe(wrapped, arguments)
    finally:
        wrapped.unwrap()
    return _judged(run)


def _judged(run: SeenRun) -> tuple[SeenRun, str | None, str | None]:
    """A run under the recipe that failed, by whose fault it was."""
    return (run, None, run.error) if run.is_adapters_fault else (run, run.error, None)


def _filled(pipe: Any, stock: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A wrapped pipeline fills in the recipe's guidance where the call says nothing."""
    if not isinstance(pipe, FewStepPipeline):
        return given
    return {**translate_guidance(stock, pipe.recipe.guidance), **given}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the checks may look at: no tensors and pictures."""
    kinds = (str, int, float, bool, list, tuple)
    return {name: value for name, value in arguments.items() if isinstance(value, kinds)}
