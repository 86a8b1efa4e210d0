"""One call of a stock pipeline under a recipe: arguments filled, adapters on, noise bound."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.call_arguments import fill_arguments, has_inert_negative_prompt
from fewstep.pipeline.experts.networks import check_counts, has_own_networks
from fewstep.pipeline.few_step_class import stock_class
from fewstep.pipeline.teacher_refine import TeacherRefine, refining
from fewstep.pipeline.wrapping import Wrapping
from fewstep.schedulers import FewStepScheduler

USER = 5
"""Stack depth of whoever called the pipeline, for warnings."""


def sample(
    pipe: DiffusionPipeline,
    state: Wrapping,
    call: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    seed: int | Sequence[int] | None,
    refine: TeacherRefine | None,
) -> Any:
    """What the stock call gives, sampled by the recipe.

    Args:
        pipe: The wrapped pipeline.
        state: What wrapping did.
        call: The stock class's `__call__`.
        given: What the caller passed, by name.
        seed: First image's seed, or one seed per image.
        refine: Refinement by the teacher, if asked for.

    Raises:
        PipelineError: The pipeline is no longer as it was wrapped, or arguments contradict.
        RecipeError: The model was not made for the step count asked for.
    """
    scheduler = pipe.components["scheduler"]
    if not isinstance(scheduler, FewStepScheduler):
        raise PipelineError(
            f"the scheduler was replaced by {type(scheduler).__name__}, which does not know "
            "the recipe; unwrap() the pipeline to sample it freely"
        )
    stock, recipe = stock_class(pipe), state.resolved.recipe
    arguments = fill_arguments(stock, given, recipe, num_steps=state.num_steps, seed=seed)
    if has_inert_negative_prompt(stock, arguments, recipe):
        _warn_once(
            state,
            "the negative prompt has no effect: this model runs with guidance "
            f"{recipe.guidance.mode!r}",
        )
    num_steps = arguments["num_inference_steps"]
    if has_own_networks(recipe):
        check_counts(pipe, recipe, recipe.grid(num_steps))
    if state.experts is not None and (complaint := state.experts.prepare(pipe)) is not None:
        _warn_once(state, complaint)
    # SD3, FLUX and others draw the first noise before they tell the step count; its scale and
    # size are those of the grid that is asked for now.
    scheduler.set_timesteps(num_steps)
    generator = arguments.get("generator")
    adapters = () if state.experts is None else state.experts.adapters
    with scheduler.bound(generator), refining(pipe, refine, adapters, generator):
        return call(pipe, **arguments)


def _warn_once(state: Wrapping, sentence: str) -> None:
    if sentence not in state.has_warned:
        state.has_warned |= {sentence}
        warnings.warn(sentence, stacklevel=USER)
