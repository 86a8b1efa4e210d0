"""What a perfect network says when all data are zeros: the probe's stand-in for a trained one."""

from typing import Any

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from torch import Tensor

VARIANCE_EXPLODING = (
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LMSDiscreteScheduler,
)
"""Schedulers whose sample is x0 + s * epsilon, not alpha * x0 + sigma * epsilon."""


def prediction_of(scheduler: Any) -> str:
    """ "epsilon", "v_prediction", "sample", "flow_prediction" or "trigflow".

    Args:
        scheduler: A diffusers scheduler, ours included.
    """
    config = scheduler.config
    if "FlowM" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return "flow_prediction"
    return config.get("prediction_type") or "epsilon"


def data_deviation(scheduler: Any) -> float:
    """What samples of a scheduler are scaled by: sigma_data of TrigFlow models, else 1."""
    if prediction_of(scheduler) != "trigflow":
        return 1.0
    return scheduler.config.get("sigma_data") or 1.0


def first_noise_deviation(scheduler: Any) -> float:
    """Standard deviation of the first sample a scheduler expects."""
    # Flow schedulers of diffusers have no such attribute: their first sample is noise as it is.
    first = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return first * data_deviation(scheduler)


def zero_data_output(scheduler: Any, sample: Tensor, noise: float) -> Tensor:
    """The network output at a sample that is noise alone.

    With x0 = 0 a sample is sigma * epsilon, so

        epsilon, flow: sample / sigma    v, TrigFlow: alpha * sample / sigma    x0: 0

    Args:
        scheduler: Says what kind of output it wants.
        sample: What its `step` was given. Shape (B, ...).
        noise: Its sigma, measured; karras_sigma for `VARIANCE_EXPLODING`.

    Returns:
        Shape and dtype of `sample`.
    """
    prediction = prediction_of(scheduler)
    if prediction == "sample" or noise == 0.0:
        return torch.zeros_like(sample)
    if prediction not in ("v_prediction", "trigflow"):
        return sample / noise
    if isinstance(scheduler, VARIANCE_EXPLODING):
        alpha = (noise * noise + 1.0) ** -0.5
    else:
        alpha = max(1.0 - noise * noise, 0.0) ** 0.5
    return alpha / noise * sample
