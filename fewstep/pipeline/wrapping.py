"""Putting a stock pipeline under a recipe: everything is checked, then everything is changed."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin

from fewstep.errors import PipelineError
from fewstep.pipeline.attached_adapter import ADAPTER_NAME, AdapterWeights, read_weights
from fewstep.pipeline.effect_watch import EffectWatch, watch_pipeline
from fewstep.pipeline.experts.files import (
    FoundFile,
    assign_files,
    check_no_file_is_needed,
    recipe_file,
)
from fewstep.pipeline.experts.networks import BOUNDARY, has_own_networks, install_boundary
from fewstep.pipeline.experts.policies import check_policy
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.pipeline.kinds_fit import carry, check_kinds
from fewstep.pipeline.suitability import check_suitable
from fewstep.pipeline.two_time_expert import TwoTimeExpert
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_resolution import ResolvedRecipe, recipe_sources, resolve_recipe
from fewstep.schedulers import FewStepScheduler

logger = logging.getLogger(__name__)


@dataclass
class Wrapping:
    """What wrapping did to a pipeline, so that it can be undone.

    Attributes:
        resolved: The recipe and where it came from.
        num_steps: Step count of a call that names none.
        replaced_scheduler: The scheduler the pipeline came with.
        experts: What carries the adapters, if there are any.
        replaced_boundary: The pipeline's own boundary between two networks, where it has two.
        has_warned: Sentences the user was told; once is enough.
        watches: Probes that wait for the first picture, to see that the adapters have an effect.
    """

    resolved: ResolvedRecipe
    num_steps: int
    replaced_scheduler: SchedulerMixin
    experts: ExpertSwitch | None
    replaced_boundary: float | None
    has_warned: frozenset[str] = frozenset()
    watches: tuple[EffectWatch, ...] = ()


def resolve(
    argument: FewStepRecipe | str | Path | None,
    files: Sequence[FoundFile],
    base: str | Path | None,
    base_sidecar: Path | None,
    installed: FewStepRecipe | Callable[[], ResolvedRecipe | None] | None = None,
) -> ResolvedRecipe:
    """The recipe that applies; see `recipe_sources` for the order.

    Raises:
        RecipeNotFoundError: No source has one.
        AdapterError: Two files carry recipes that differ.
    """
    speaker = recipe_file(files) if files else None
    sources = recipe_sources(
        argument=argument,
        adapter=None if speaker is None else speaker.header,
        adapter_sidecar=None if speaker is None else speaker.file.sidecar,
        base=base,
        base_sidecar=base_sidecar,
        installed=installed,
    )
    return resolve_recipe(sources)


def put_under_recipe(
    pipe: DiffusionPipeline,
    resolved: ResolvedRecipe,
    files: Sequence[FoundFile],
    *,
    steps: int | None,
    adapter_scale: float | None,
    experts: str,
    probe: bool = True,
) -> Wrapping:
    """Check, attach, install the scheduler; on an error the pipeline is left as it was.

    With `probe`, the first picture also checks that the adapters do anything (`effect_watch`), but
    not at an `adapter_scale` of 0, where they should not.

    Raises:
        AdapterError: A file does not fit, or an expert has none.
        PipelineError: The recipe is for another kind of model.
        RecipeError: The recipe was not made for this step count.
    """
    recipe = resolved.recipe
    policy = check_policy(experts)
    num_steps = recipe.grid(steps).num_steps
    check_suitable(pipe, recipe)
    scheduler = FewStepScheduler(recipe)
    before = pipe.components["scheduler"]
    switch: ExpertSwitch | None = None
    check_kinds(recipe, files)
    if files:
        scale = recipe.lora.scale if adapter_scale is None else adapter_scale
        switch = carry(pipe, recipe, files, read_all(pipe, recipe, files, scale), policy)
    elif adapter_scale is not None:
        raise PipelineError("adapter_scale was passed without an adapter; pass adapter= too")
    else:
        switch = _shared_switch(before, recipe)
        if switch is None:
            check_no_file_is_needed(recipe)
    if switch is not None:
        scheduler.before_call = switch.before_call
        scheduler.is_target_told = isinstance(switch, TwoTimeExpert)
        switch.hold(pipe)
    if isinstance(before, FewStepScheduler):  # made by from_pipe of a wrapped pipeline
        before = before.replaced or before
    scheduler.replaced = before
    boundary = install_boundary(pipe, recipe) if has_own_networks(recipe) else None
    wrapped: Any = pipe
    wrapped.scheduler = scheduler
    is_probed = probe and bool(files) and adapter_scale != 0
    watches = tuple(watch_pipeline(pipe)) if is_probed else ()
    return Wrapping(resolved, num_steps, before, switch, boundary, watches=watches)


def take_from_under_recipe(pipe: DiffusionPipeline, state: Wrapping) -> None:
    """Undo `put_under_recipe`; a fused adapter stays in the weights, and that is logged.

    Raises:
        PipelineError: Offloading keeps weights elsewhere that were exchanged.
    """
    if state.experts is not None and state.experts.is_permanent:
        logger.warning("the adapter is fused into the weights and stays there")
    elif state.experts is not None:
        _remove_unless_shared(pipe, state.experts)
    if has_own_networks(state.resolved.recipe):
        pipe.register_to_config(**{BOUNDARY: state.replaced_boundary})
    for watch in state.watches:
        watch.stop()
    unwrapped: Any = pipe
    unwrapped.scheduler = state.replaced_scheduler


def without_revision(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Hub options for the adapter: the revision is the base's."""
    return {key: value for key, value in hub.items() if key != "revision"}


def read_all(
    pipe: DiffusionPipeline, recipe: FewStepRecipe, files: Sequence[FoundFile], scale: float
) -> list[AdapterWeights]:
    """The weights of every file, each checked against the model it goes on.

    Raises:
        AdapterError: One does not fit.
    """
    return [
        read_weights(
            pipe,
            assigned.header,
            scale,
            expert=assigned.expert,
            name=_peft_name(assigned.name),
            component=assigned.component,
        )
        for assigned in assign_files(recipe, files)
    ]


def _peft_name(expert: str | None) -> str:
    if expert is None:
        return ADAPTER_NAME
    return f"{ADAPTER_NAME}_{re.sub('[^A-Za-z0-9_]', '_', expert)}"  # a part of tensor names


def _shared_switch(scheduler: object, recipe: FewStepRecipe) -> ExpertSwitch | None:
    """The switch of the pipeline that this one was made from, which has the same models."""
    if not isinstance(scheduler, FewStepScheduler):
        return None
    owner = getattr(scheduler.before_call, "__self__", None)
    if not isinstance(owner, ExpertSwitch):
        return None
    mine, others = ((r.experts, r.routes, r.sampler.kind) for r in (recipe, scheduler.recipe))
    if mine != others:
        raise PipelineError(
            "the models of this pipeline carry the few-step adapters of the pipeline it was made "
            "from, whose recipe has other experts or another sampler; unwrap() that one first"
        )
    return owner


def _remove_unless_shared(pipe: DiffusionPipeline, switch: ExpertSwitch) -> None:
    if not switch.release(pipe):
        logger.warning(
            "the adapter stays on: another wrapped pipeline shares these models; unwrap() that too"
        )
        return
    try:
        switch.remove(pipe)
    except BaseException:
        switch.hold(pipe)  # it stays as it is
        raise
