"""The SAMPLER that samples as FewStepPipeline does: same steps, same noise, same first sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from fewstep.comfy_nodes.masked_model import MaskedModel, is_mask_moving
from fewstep.comfy_nodes.model_levels import comfy_sigmas, levels_for
from fewstep.comfy_nodes.model_steps import model_steps, mu_for
from fewstep.comfy_nodes.noise_stream import REPRODUCIBLE, Draw, Streams, batch_stream, streams_of
from fewstep.comfy_nodes.sampling_limits import check_can_sample
from fewstep.comfy_nodes.sigma_lists import find_run, numbers
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.comfy_nodes.step_loop import run_steps
from fewstep.errors import ConfigError
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.sampling import add_noise
from fewstep.start_rules import Start, snap_start
from fewstep.trajectory import PlannedStep

Callback = Callable[[int, Tensor, Tensor, int], None]
"""(step, x0, sample, number of steps): progress, preview and interruption hang on it."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What an unfinished run left for the sampler after it.

    Attributes:
        probe: Some values of the sample, to know it again by.
        seed: Of the streams it drew from.
    """

    probe: Tensor
    seed: int


class FewStepSampler(comfy.samplers.Sampler):
    """Samples by a recipe, in place of a stock SAMPLER.

    The first sample is what FewStepPipeline starts from: noise alone where the latent is empty (or
    where a mask is given and the grid is whole), the latent with the first sigma's noise where it
    is not, and the latent itself where the noise is disabled. The grid's end is returned as it is,
    even above sigma 0, as FewStepPipeline decodes it.

    Args:
        recipe: How to sample.
        num_steps: Of which step count; None means the recipe's default.
        strength: The `denoise` its SIGMAS were made for; below 1 they begin inside the grid.
        streams: Whose noise re-noising steps draw.

    Raises:
        RecipeError: These nodes do not sample this recipe.
    """

    def __init__(
        self,
        recipe: FewStepRecipe,
        num_steps: int | None = None,
        *,
        strength: float = 1.0,
        streams: Streams = batch_stream,
    ) -> None:
        check_can_sample(recipe)
        self.recipe = recipe
        self.num_steps = num_steps
        self.strength = strength
        self.streams = streams
        self._handed_over: HandedOver | None = None

    def with_streams(self, streams: Streams) -> "FewStepSampler":
        """The same sampler, drawing other noise."""
        return FewStepSampler(self.recipe, self.num_steps, strength=self.strength, streams=streams)

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callback | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by a GUIDER.

        Args:
            model_wrap: The GUIDER: (x, sigma) -> x0, with guidance.
            sigmas: Those made with this sampler, whole or a run of them (SplitSigmas).
            extra_args: model_options and seed, passed on.
            callback: Called after every network call.
            noise: Standard normal, (B, ...); zeros where the latent has noise in it (DisableNoise).
            latent_image: What to start from, same shape; zeros where there is no picture.
            denoise_mask: 1 where the picture is made, 0 where it is kept.
            disable_pbar: No bar on the console.

        Returns:
            The finished latents; where the sigmas end earlier, the sample in ComfyUI's terms.

        Raises:
            ConfigError: The sigmas are not this sampler's.
            AdapterError: MODEL is another base.
        """
        base = model_wrap.inner_model
        latents = torch.zeros_like(noise) if latent_image is None else latent_image
        has_picture, is_fresh = _is_any(latents), _is_any(noise)
        mu = mu_for(self.recipe, base, tuple(noise.shape), self.num_steps)
        begin, end = self._run_of(base.model_sampling, sigmas, mu)
        start = self._start(mu, has_picture=has_picture)
        levels = levels_for(self.recipe, base.model_sampling)
        steps = model_steps(self.recipe, start.plan, levels)[begin:end]

        seed, taken = extra_args.get("seed") or 0, start.plan[:0]
        if not is_fresh:  # another run took the steps before these, and drew for them
            seed, taken = self._seed_before(latents, seed), start.plan[start.index : begin]
        draw = self.streams(seed, noise)
        _skip(draw, taken)

        is_masked = denoise_mask is not None and not is_mask_moving(extra_args)
        is_whole = is_masked and begin == 0 and self.strength == 1.0 and is_fresh
        first = steps[0].planned.level
        if has_picture and not is_whole:
            sample = add_noise(latents, noise, first)
        else:
            sample = first_noise_scale(self.recipe, first) * noise
        network = MaskedModel(
            guider=model_wrap,
            sigmas=sigmas,
            extra_args=extra_args,
            noise=noise,
            latents=latents,
            mask=denoise_mask,
            whole_noise=steps[0] if is_whole else None,
        )
        sample = run_steps(
            network,
            sample.to(torch.float32),
            steps,
            draw=draw,
            tell=_telling(callback, len(steps)),
            disable_pbar=disable_pbar,
        )
        if end == len(start.plan):
            return network.keep(sample)
        sample = levels.scale(steps[-1].planned.following) * sample
        sample = base.model_sampling.inverse_noise_scaling(sigmas[-1], sample)
        self._handed_over = HandedOver(_probe(sample), seed)
        return sample

    def _run_of(self, model_sampling: Any, sigmas: Tensor, mu: float | None) -> tuple[int, int]:
        own = comfy_sigmas(self.recipe, model_sampling, self.num_steps, mu).tolist()
        given = sigmas.tolist()
        begin = find_run(own, given)
        if begin is None or len(given) < 2:
            raise ConfigError(
                f"These SIGMAS ({numbers(given)}) are not of this sampler, which steps through "
                f"{numbers(own)}; connect the SIGMAS of the same node, whole or split."
            )
        return begin, begin + len(given) - 1

    def _start(self, mu: float | None, *, has_picture: bool) -> Start:
        plan = plan_steps(self.recipe, self.num_steps, mu=mu)
        return snap_start(self.recipe, plan, self.strength) if has_picture else Start(plan, 0)

    def _seed_before(self, latents: Tensor, seed: int) -> int:
        """DisableNoise has no seed; the run that left this sample had one."""
        handed = self._handed_over
        if seed or handed is None:
            return seed
        probe = _probe(latents)
        is_known = probe.shape == handed.probe.shape
        if is_known and torch.allclose(probe, handed.probe, rtol=1e-3, atol=1e-3):
            return handed.seed
        return seed


def build_sampling(
    model: Any,
    named: NamedRecipe,
    *,
    steps: int = 0,
    denoise: float = 1.0,
    noise: str = REPRODUCIBLE,
    latent_shape: Sequence[int] | None = None,
) -> tuple[FewStepSampler, Tensor]:
    """A SAMPLER and its SIGMAS.

    Args:
        model: A MODEL.
        named: How to sample it.
        steps: Step count; 0 means the recipe's default.
        denoise: 0 to 1, of image to image: the trained step whose noise is nearest begins.
        noise: One of `noise_stream.STREAMS`.
        latent_shape: Of what is sampled; recipes whose sigmas depend on the size need it.

    Raises:
        RecipeError: Not a step count of this model, or a recipe these nodes do not sample.
        AdapterError: MODEL is another base.
        ConfigError: The size is needed.
    """
    recipe, count = named.recipe, steps or None
    sampler = FewStepSampler(recipe, count, strength=denoise, streams=streams_of(noise))
    shape = None if latent_shape is None else tuple(latent_shape)
    mu = mu_for(recipe, model.model, shape, count)
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy_sigmas(recipe, model_sampling, count, mu)
    plan = plan_steps(recipe, count, mu=mu)
    model_steps(recipe, plan, levels_for(recipe, model_sampling))  # refuses here, not while it runs
    begin = snap_start(recipe, plan, denoise).index if denoise < 1.0 else 0
    return sampler, sigmas[begin:]


def kept_steps(sigmas: Tensor, num_steps: int, denoise: float) -> str | None:
    """What a `denoise` below 1 means on a grid of few steps, for people; None at 1.

    Args:
        sigmas: What `build_sampling` gave.
        num_steps: Of the whole grid.
        denoise: What was asked for.
    """
    if denoise >= 1.0:
        return None
    return (
        f"denoise {denoise:.2f} keeps {len(sigmas) - 1} of {num_steps} steps (sigma "
        f"{float(sigmas[0]):.2f}). Few-step adapters have only {num_steps} strengths."
    )


def _telling(callback: Callback | None, total: int) -> Callable[[int, Tensor, Tensor], None] | None:
    return None if callback is None else lambda step, x0, sample: callback(step, x0, sample, total)


def _skip(draw: Draw, steps: Sequence[PlannedStep]) -> None:
    for planned in steps:
        if planned.needs_noise:
            draw()


def _is_any(values: Tensor) -> bool:
    return bool(torch.count_nonzero(values))


def _probe(sample: Tensor) -> Tensor:
    flat = sample.flatten()
    return flat[:: max(1, len(flat) // 64)].float().cpu()
