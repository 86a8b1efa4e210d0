"""A stock pipeline as a denoiser: x0 = denoise(sample, level), by the pipeline's own call.

Guidance, conditioning, packing and casts are the pipeline's: it is run for one step, from the given
sample, with a scheduler in place that hands over what the network said. Nothing about a family is
repeated here, so every pipeline that takes `latents` is served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.noise_schedule import Level
from fewstep.pipeline.call_arguments import count_images
from fewstep.pipeline.guidance import call_parameters
from fewstep.pipeline.stock_base import describe_base
from fewstep.recipe import Base
from fewstep.sampling import Prediction, to_x0
from fewstep.schedulers import FewStepSchedulerOutput

FULL_NOISE = 0.9
"""Sigma of a first call that only asks for the pipeline's noise; its answer is not used."""


class OneCallScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of one step that keeps what it is given.

    Args:
        level: Where the sample is; its timestep is what the network is told.
        prediction: What the network says.
        config: Of the scheduler whose place it takes; pipelines read it to compute mu.

    Attributes:
        sample: What the pipeline gave `step` as the sample, float32 or wider; None before.
        dtype: The dtype it had.
        x0: Predicted clean data, float32 or wider; None before.
        mu: The shift the pipeline computed for the image size, where it did.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, level: Level, prediction: Prediction, config: Mapping[str, Any]) -> None:
        self.register_to_config(**{k: v for k, v in config.items() if not k.startswith("_")})
        self._level = level
        self._prediction: Prediction = prediction
        self.sample: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.x0: Tensor | None = None
        self.mu: float | None = None
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """One step at the level, whatever is asked for."""
        self.mu = mu
        self.num_inference_steps = 1
        self.timesteps = torch.tensor([self._level.timestep], device=device)
        self.sigmas = torch.tensor([self._level.sigma, 0.0])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing: there is one step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> FewStepSchedulerOutput | tuple[Tensor, Tensor]:
        """Keeps sample and x0, and gives x0 back as the end of the trajectory."""
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        self.sample, self.dtype = sample.to(dtype), sample.dtype
        self.x0 = to_x0(self._prediction, model_output.to(dtype), self.sample, self._level)
        end = self.x0.to(sample.dtype)
        if not return_dict:
            return end, end  # PixArt looks at the second
        return FewStepSchedulerOutput(prev_sample=end, pred_original_sample=end)


class PipelineDenoiser:
    """The boundary of a loaded pipeline.

    Args:
        pipe: A stock pipeline with the scheduler it came with.
        arguments: Of its call, guidance included (`call_arguments.fill_arguments`); steps, latents,
            generator and output type are ours.

    Attributes:
        base: Prediction and schedule, read from the scheduler.

    Raises:
        PipelineError: The pipeline takes no latents, or its scheduler is of no known kind.
    """

    def __init__(self, pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
        self._pipe: Any = pipe
        self._taken = call_parameters(type(pipe))
        if "latents" not in self._taken:
            raise PipelineError(f"{type(pipe).__name__} takes no latents; use text to image")
        ours = {"num_inference_steps", "latents", "generator", "output_type", "seed"}
        self._arguments = {k: v for k, v in arguments.items() if k not in ours}
        self._encoded: dict[int, Any] = {}
        self._dtype: torch.dtype | None = None
        self.base: Base = describe_base(pipe)

    def __call__(self, sample: Tensor, level: Level) -> Tensor:
        """Predicted clean data.

        Args:
            sample: At the level, in the pipeline's own layout (FLUX packs). A batch of as many
                pictures as the arguments ask for.
            level: Where it is.

        Returns:
            x0 of the sample's shape, float32 or wider.
        """
        # Some pipelines take latents as they come, whatever their network's dtype is.
        seen = self._run(level, {"latents": sample.to(self._dtype or sample.dtype)})
        if seen.x0 is None or seen.x0.shape != sample.shape:
            raise PipelineError(
                f"{type(self._pipe).__name__} made no step on a sample of {tuple(sample.shape)}; "
                "pass one sample per picture, as `noise` gives them"
            )
        return seen.x0.to(sample.device)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The pipeline's own first noise, of deviation 1; costs one network call.

        Afterwards `base` has the shift for the image size in use.

        Args:
            seeds: One per picture.

        Raises:
            PipelineError: The arguments ask for another number of pictures.
        """
        count = count_images(self._arguments)
        if len(seeds) != count:
            raise PipelineError(f"got {len(seeds)} seeds for {count} images; pass one per image")
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        schedule = self.base.schedule.build()
        level = schedule.level(schedule.timestep_of_sigma(FULL_NOISE))
        seen = self._run(level, {"generator": generators if count > 1 else generators[0]})
        if seen.sample is None:
            raise PipelineError(f"{type(self._pipe).__name__} made no step; nothing was seen")
        self.base = describe_base(self._pipe, seen.mu)
        self._dtype = seen.dtype
        return seen.sample

    def _run(self, level: Level, start: Mapping[str, Any]) -> OneCallScheduler:
        pipe = self._pipe
        scheduler = OneCallScheduler(level, self.base.prediction, pipe.scheduler.config)
        arguments = {**self._arguments, **start, "num_inference_steps": 1}
        if "output_type" in self._taken:
            arguments["output_type"] = "latent"
        with ExitStack() as stack:
            stack.enter_context(_replaced(pipe, "scheduler", scheduler))
            stack.enter_context(_without_progress_bar(pipe))
            if hasattr(pipe, "encode_prompt"):
                stack.enter_context(self._encoding_once())
            pipe(**arguments)
        return scheduler

    @contextmanager
    def _encoding_once(self) -> Iterator[None]:
        """The arguments never change, so neither do the encoded prompts: encode in the first call.

        The n-th `encode_prompt` of every call answers as the n-th of the first did.
        """
        encode: Callable[..., Any] = self._pipe.encode_prompt
        index = 0

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            nonlocal index
            if index not in self._encoded:
                self._encoded[index] = encode(*args, **kwargs)
            index += 1
            return self._encoded[index - 1]

        self._pipe.__dict__["encode_prompt"] = encode_prompt
        try:
            yield
        finally:
            del self._pipe.__dict__["encode_prompt"]


class ChunkedDenoiser:
    """Several denoisers, each for its own pictures, as one for all of them.

    Args:
        parts: (denoiser, how many pictures it takes), in order.
    """

    def __init__(self, parts: Sequence[tuple[Callable[[Tensor, Level], Tensor], int]]) -> None:
        self._parts = tuple(parts)

    def __call__(self, sample: Tensor, level: Level) -> Tensor:
        """x0 of a whole batch."""
        pieces = sample.split([count for _, count in self._parts])
        return torch.cat(
            [part(piece, level) for (part, _), piece in zip(self._parts, pieces, strict=True)]
        )


@contextmanager
def _replaced(pipe: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(pipe, name)
    setattr(pipe, name, value)
    try:
        yield
    finally:
        setattr(pipe, name, before)


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    before = dict(getattr(pipe, "_progress_bar_config", {}))  # made when it is first needed
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
