"""A base made ready to be searched or fitted: prompts encoded, noise drawn, schedule read."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.pipeline.call_arguments import fill_arguments
from fewstep.pipeline.pipeline_denoiser import ChunkedDenoiser, PipelineDenoiser
from fewstep.pipeline.stock_base import describe_base, describe_guidance
from fewstep.recipe import Base, FewStepRecipe, Guidance
from fewstep.solvers.flow_frame import even_levels, grid_of

OnCall = Callable[[], None]
"""Told after every network call, for progress bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """What a search or fit looks at.

    Attributes:
        prompts: One picture each; what the grid is fitted on.
        guidance_scale: w in `uncond + w * (cond - uncond)`; None takes the pipeline's default.
        teacher_steps: Even steps of the teacher; a multiple of the step counts is best.
        seed: Picture i starts from the noise of seed + i.
        batch_size: Pictures per network call.
        max_sequence_length: Text tokens, where the pipeline takes that.
        height: In pixels; None takes the pipeline's default.
        width: Likewise.
    """

    prompts: tuple[str, ...]
    guidance_scale: float | None = None
    teacher_steps: int = 96
    seed: int = 0
    batch_size: int = 8
    max_sequence_length: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("a fit needs prompts, got none; give a file with one per line")
        if self.teacher_steps < 2 or self.batch_size < 1:
            raise ConfigError(
                f"a fit needs teacher_steps >= 2 and batch_size >= 1, got {self.teacher_steps} "
                f"and {self.batch_size}"
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """A base made ready to be searched.

    Attributes:
        denoise: Its boundary, guidance included.
        sample: First noise, scaled to full noise of the schedule.
        base: As the recipe will say it.
        guidance: Likewise.
        settings: What it was made from.
        name: Of the base, for provenance.
    """

    denoise: Callable[[Tensor, Level], Tensor]
    sample: Tensor
    base: Base
    guidance: Guidance
    settings: FitSettings
    name: str

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the base, as arithmetic."""
        return self.base.schedule.build()

    @property
    def teacher_levels(self) -> tuple[Level, ...]:
        """The teacher's even grid."""
        return even_levels(self.schedule, self.settings.teacher_steps)


def prepare(
    pipe: DiffusionPipeline,
    settings: FitSettings,
    *,
    name: str | None = None,
    on_call: OnCall | None = None,
) -> Problem:
    """Encode the prompts, draw the noise, read the base's schedule.

    Args:
        pipe: A stock text-to-image (or text-to-video) pipeline.
        settings: What to look at.
        name: Of the base, for provenance; its class where none is given.
        on_call: Told after every network call of the search.

    Raises:
        PipelineError: The pipeline's scheduler or guidance is of no kind that recipes know.
    """
    guidance = describe_guidance(pipe, settings.guidance_scale)
    base = dataclasses.replace(
        describe_base(pipe), model_id=name, max_sequence_length=settings.max_sequence_length
    )
    parts: list[tuple[PipelineDenoiser, int]] = []
    noises: list[Tensor] = []
    for start in range(0, len(settings.prompts), settings.batch_size):
        prompts = settings.prompts[start : start + settings.batch_size]
        denoise = PipelineDenoiser(pipe, _arguments(pipe, settings, prompts, base, guidance))
        noises.append(
            denoise.noise(range(settings.seed + start, settings.seed + start + len(prompts)))
        )
        parts.append((denoise, len(prompts)))
    base = dataclasses.replace(base, schedule=parts[0][0].base.schedule)  # shifted for the size
    whole = ChunkedDenoiser(parts)

    def counted(sample: Tensor, level: Level) -> Tensor:
        x0 = whole(sample, level)
        if on_call is not None:
            on_call()
        return x0

    noise = torch.cat(noises) * even_levels(base.schedule.build(), 1)[0].sigma
    return Problem(counted, noise, base, guidance, settings, name or type(pipe).__name__)


def _arguments(
    pipe: DiffusionPipeline,
    settings: FitSettings,
    prompts: Sequence[str],
    base: Base,
    guidance: Guidance,
) -> dict[str, Any]:
    """Of the pipeline's call, as a recipe with this guidance would fill them."""
    given: dict[str, Any] = {"prompt": list(prompts)}
    for name in ("height", "width"):
        if getattr(settings, name) is not None:
            given[name] = getattr(settings, name)
    grid = grid_of(even_levels(base.schedule.build(), 1))
    frame = FewStepRecipe(base=base, grids=(grid,), default_steps=1, guidance=guidance)
    return fill_arguments(type(pipe), given, frame, num_steps=1, seed=None)
