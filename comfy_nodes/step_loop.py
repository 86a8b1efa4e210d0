"""The loop of our samplers, and the one for any sigmas without a recipe.

Samples are kept as a recipe states them (`alpha * x0 + sigma * noise`, float32) and turned into the
MODEL's terms around each call of it; the steps themselves are the library's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor
from tqdm.auto import trange

from fewstep.comfy_nodes.model_levels import levels_of_model, levels_of_sigmas
from fewstep.comfy_nodes.model_steps import ModelStep
from fewstep.comfy_nodes.noise_stream import Draw, Streams, batch_stream, streams_of
from fewstep.trajectory import advance, plain_steps

Denoise = Callable[[ModelStep, Tensor], Tensor]
"""(step, the recipe's sample) -> x0 as the recipe reads it."""

Tell = Callable[[int, Tensor, Tensor], None]
"""(step, x0, the MODEL's sample): progress, preview and interruption hang on it."""


def run_steps(
    denoise: Denoise,
    sample: Tensor,
    steps: Sequence[ModelStep],
    *,
    draw: Draw,
    tell: Tell | None,
    disable_pbar: bool | None,
) -> Tensor:
    """The loop: one network call and one step of the library's at a time.

    Args:
        denoise: The network.
        sample: At the first step's level, in the recipe's terms. Shape (B, ...), float32.
        steps: What to take.
        draw: Called once per step that adds noise.
        tell: Called after every network call; may raise to stop.
        disable_pbar: No bar on the console.
    """
    previous: tuple[Tensor, Tensor] | None = None
    for index in trange(len(steps), disable=disable_pbar):
        planned = steps[index].planned
        x0 = denoise(steps[index], sample)
        if tell is not None:
            tell(index, x0, steps[index].scale * sample)
        fresh = draw() if planned.needs_noise else None
        sample, previous = advance(planned, sample, x0, fresh, previous), (sample, x0)
    return sample


@torch.no_grad()
def sample_few_step(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    stochasticity: float = 0.0,
    streams: Streams = batch_stream,
) -> Tensor:
    """A sampler function of ComfyUI's: any sigmas, one stochasticity.

    Args:
        model: (x, sigma) -> x0.
        x: At the first sigma, in ComfyUI's terms.
        sigmas: Falling.
        extra_args: Passed on.
        callback: Given x, i, sigma, sigma_hat and denoised.
        disable: No bar on the console.
        stochasticity: 0 Euler, 1 re-noising (LCM, DMD2), between TCD's gamma.
        streams: Whose noise re-noising steps draw.

    Returns:
        The sample at the last sigma, in ComfyUI's terms.
    """
    arguments = extra_args or {}
    model_sampling = model.inner_model.inner_model.model_sampling
    levels = levels_of_model(model_sampling)
    planned = plain_steps(levels_of_sigmas(sigmas, model_sampling), levels.schedule, stochasticity)
    steps = [
        ModelStep(one, *2 * (levels.scale(one.level), sigma))
        for one, sigma in zip(planned, sigmas.tolist(), strict=False)
    ]

    def denoise(step: ModelStep, sample: Tensor) -> Tensor:
        return model(step.scale * sample, x.new_full((x.shape[0],), step.sigma), **arguments)

    def tell(index: int, x0: Tensor, at: Tensor) -> None:
        sigma = sigmas[index]
        if callback is not None:
            callback({"x": at, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})

    sample = run_steps(
        denoise,
        x / steps[0].scale,
        steps,
        draw=streams(arguments.get("seed") or 0, x),
        tell=tell,
        disable_pbar=disable,
    )
    return levels.scale(planned[-1].following) * sample


def stochastic_sampler(stochasticity: float, noise: str) -> Any:
    """The SAMPLER of `sample_few_step`."""
    options = {"stochasticity": stochasticity, "streams": streams_of(noise)}
    return comfy.samplers.KSAMPLER(sample_few_step, options)
