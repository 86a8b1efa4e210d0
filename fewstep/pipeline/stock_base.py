"""What a stock pipeline is made of, as a recipe says it: prediction, schedule, guidance.

Read from the scheduler it came with, for recipes that need no training (`fewstep.solvers`).
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.families import families_of
from fewstep.pipeline.guidance import call_parameters, rule_of
from fewstep.recipe import Base, Guidance, Schedule
from fewstep.sampling import Prediction

VP_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def describe_base(pipe: DiffusionPipeline, mu: float | None = None) -> Base:
    """The base of a loaded pipeline.

    Args:
        pipe: A stock pipeline with the scheduler it came with.
        mu: The shift the pipeline computes for the image size in use, for schedulers that follow
            the size; None takes their fixed shift.

    Raises:
        PipelineError: The scheduler is of no kind that recipes know.
    """
    scheduler: Any = pipe.components.get("scheduler")
    if scheduler is None:
        raise PipelineError(f"{type(pipe).__name__} has no scheduler; use a single-stage pipeline")
    config: Mapping[str, Any] = scheduler.config
    name = type(scheduler).__name__
    is_flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    families = families_of(type(pipe).__name__)
    return Base(
        family=families[0] if families else type(pipe).__name__.removesuffix("Pipeline").lower(),
        prediction="flow" if is_flow else _vp_prediction(config, name),
        schedule=_flow(config, mu) if is_flow else _vp(config, name),
    )


def describe_guidance(pipe: DiffusionPipeline, scale: float | None = None) -> Guidance:
    """How a pipeline guides by default, or at a given scale.

    Args:
        pipe: A stock pipeline.
        scale: w in `uncond + w * (cond - uncond)`, or the embedded scale of models that have one;
            None takes the pipeline's default.

    Raises:
        PipelineError: A scale was given for a pipeline that cannot guide.
    """
    stock = type(pipe)
    rule, _ = rule_of(stock.__name__, call_parameters(stock))
    is_embedded = rule.embedded is not None and (rule.cfg is None or rule.embedded_off is not None)
    argument = rule.embedded if is_embedded else rule.cfg
    parameters = inspect.signature(cast(Any, stock).__call__).parameters
    if argument is None or argument not in parameters:
        if scale not in (None, 1.0):
            raise PipelineError(f"{stock.__name__} cannot guide; leave the guidance scale out")
        return Guidance()
    if scale is None:
        default = parameters[argument].default
        scale = float(default) - (0.0 if is_embedded else rule.offset)
    if is_embedded:
        return Guidance(mode="embedded", scale=scale)
    if scale <= 1.0:
        return Guidance()
    return Guidance(mode="cfg", scale=scale, negative_prompt="works")


def _vp_prediction(config: Mapping[str, Any], name: str) -> Prediction:
    kind = config.get("prediction_type", "epsilon")
    if kind not in VP_PREDICTIONS:
        raise PipelineError(
            f"{name} has prediction_type {kind!r}, which no recipe knows; "
            f"wanted {', '.join(VP_PREDICTIONS)} or a flow scheduler"
        )
    return VP_PREDICTIONS[kind]


def _vp(config: Mapping[str, Any], name: str) -> Schedule:
    betas = config.get("beta_schedule")
    special = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    if betas not in ("scaled_linear", "linear") or special:
        raise PipelineError(
            f"{name} has betas that no recipe knows ({betas!r}); wanted plain scaled_linear or "
            "linear ones"
        )
    return Schedule(
        kind="vp",
        num_train_timesteps=config["num_train_timesteps"],
        beta_schedule=cast(Literal["scaled_linear", "linear"], betas),
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
    )


def _flow(config: Mapping[str, Any], mu: float | None) -> Schedule:
    shift = config.get("flow_shift", config.get("shift")) or 1.0
    if config.get("use_dynamic_shifting") and mu is not None:
        shift = math.exp(mu) if config.get("time_shift_type") != "linear" else mu
    return Schedule(
        kind="flow", num_train_timesteps=config["num_train_timesteps"], shift=float(shift)
    )
