"""Few-step recipes without training: a base, some prompts, and a search or a fit against itself.

    problem = prepare(pipe, FitSettings(prompts=..., guidance_scale=4.5))
    recipe = searched_recipe(problem, (4, 8))

The teacher is the base at many even steps with the same guidance. Nothing of the network changes,
so a recipe made here is the only file that is needed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import Tensor

import fewstep
from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.pipeline.call_arguments import fill_arguments
from fewstep.pipeline.pipeline_denoiser import ChunkedDenoiser, PipelineDenoiser
from fewstep.pipeline.stock_base import describe_base, describe_guidance
from fewstep.recipe import Base, FewStepRecipe, Grid, Guidance, Provenance
from fewstep.solvers import bespoke, optimal_steps
from fewstep.solvers.d_ode import fit_d_ode
from fewstep.solvers.flow_frame import even_levels, grid_of, refined_levels
from fewstep.solvers.scale_time import RK1, RK2, Method
from fewstep.solvers.teacher_path import teacher_states

Kind = Literal["d-ode", "bespoke-rk1", "bespoke-rk2"]
METHODS: dict[str, Method] = {RK1.name: RK1, RK2.name: RK2}
SOURCES = {
    "optimal steps": "arXiv:2503.21774",
    "d-ode": "arXiv:2309.16421",
    "bespoke-rk1": "arXiv:2310.19075",
    "bespoke-rk2": "arXiv:2310.19075",
}
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
    given = Base(
        **{
            **_fields(describe_base(pipe)),
            "model_id": name,
            "max_sequence_length": settings.max_sequence_length,
        }
    )
    frame = _recipe(given, guidance, (grid_of(even_levels(given.schedule.build(), 1)),))
    parts, noises = [], []
    for start in range(0, len(settings.prompts), settings.batch_size):
        prompts = settings.prompts[start : start + settings.batch_size]
        denoise = PipelineDenoiser(pipe, _arguments(pipe, settings, prompts, frame))
        seeds = range(settings.seed + start, settings.seed + start + len(prompts))
        noises.append(denoise.noise(seeds))
        parts.append((denoise, len(prompts)))
    shifted = parts[0][0].base.schedule
    base = Base(**{**_fields(given), "schedule": shifted})
    noise = noises[0].new_tensor([]) if not noises else _joined(noises)
    whole = ChunkedDenoiser(parts)

    def counted(sample: Tensor, level: Level) -> Tensor:
        x0 = whole(sample, level)
        if on_call is not None:
            on_call()
        return x0

    first = even_levels(shifted.build(), 1)[0]
    return Problem(
        counted, noise * first.sigma, base, guidance, settings, name or type(pipe).__name__
    )


def searched_recipe(problem: Problem, step_counts: Sequence[int]) -> FewStepRecipe:
    """Optimal grids (`optimal_steps`) of several step counts, by one search.

    Raises:
        ConfigError: A step count above the teacher's.
    """
    found = optimal_steps.optimal_grids(
        problem.denoise, problem.sample, problem.teacher_levels, step_counts
    )
    errors = {count: (f.error, f.even_error) for count, f in found.items()}
    grids = tuple(grid_of(found[count].levels) for count in sorted(found))
    return _finished(problem, "optimal steps", grids, errors)


def fitted_recipe(
    problem: Problem,
    kind: Kind,
    step_counts: Sequence[int],
    *,
    on: FewStepRecipe | None = None,
    num_rounds: int = bespoke.NUM_ROUNDS,
) -> FewStepRecipe:
    """Fitted solvers of several step counts.

    Args:
        problem: From `prepare`.
        kind: Which solver.
        step_counts: Network calls per image (half as many steps for "bespoke-rk2").
        on: A recipe of the same base whose grids to fit on; even grids where none is given.
        num_rounds: Of Bespoke fits.

    Raises:
        ConfigError: An odd count for "bespoke-rk2", or `on` with it.
        RecipeError: `on` does not have such a step count.
    """
    grids: list[Grid] = []
    errors: dict[int, tuple[float, float]] = {}
    for count in sorted(set(step_counts)):
        levels = _start_levels(problem, kind, count, on)
        if kind == "d-ode":
            grid, error, plain = _d_ode(problem, levels)
        else:
            grid, error, plain = _bespoke(problem, METHODS[kind], levels, num_rounds)
        grids.append(grid)
        errors[count] = (error, plain)
    return _finished(problem, kind, tuple(grids), errors)


def count_fit_calls(
    kind: Kind, step_counts: Sequence[int], teacher_steps: int, num_rounds: int
) -> int:
    """Network calls of `fitted_recipe`, about."""
    total = 0
    for count in step_counts:
        if kind == "d-ode":
            total += count * max(1, round(teacher_steps / count)) + 2 * count
        else:
            total += teacher_steps + bespoke.count_calls(count, METHODS[kind], num_rounds)
    return total


def _start_levels(
    problem: Problem, kind: Kind, count: int, on: FewStepRecipe | None
) -> tuple[Level, ...]:
    if kind != "bespoke-rk2":
        return even_levels(problem.schedule, count) if on is None else on.levels(count)
    if count % 2 or on is not None:
        raise ConfigError(
            f"bespoke-rk2 calls the network twice a step and places its own midpoints; give an "
            f"even number of calls, got {count}, and no grid"
        )
    return even_levels(problem.schedule, count // 2)


def _d_ode(problem: Problem, levels: tuple[Level, ...]) -> tuple[Grid, float, float]:
    factor = max(1, round(problem.settings.teacher_steps / (len(levels) - 1)))
    fine = refined_levels(problem.schedule, levels, factor)
    targets = teacher_states(problem.denoise, problem.sample, fine)[::factor]
    fit = fit_d_ode(problem.denoise, problem.sample, levels, targets)
    return grid_of(levels, fit.rows), fit.error, fit.plain_error


def _bespoke(
    problem: Problem, method: Method, levels: tuple[Level, ...], num_rounds: int
) -> tuple[Grid, float, float]:
    target = teacher_states(problem.denoise, problem.sample, problem.teacher_levels)[-1]
    fit = bespoke.fit_bespoke(
        problem.denoise,
        problem.sample,
        problem.schedule,
        levels,
        target,
        method,
        num_rounds=num_rounds,
    )
    return fit.grid, fit.error, fit.plain_error


def _arguments(
    pipe: DiffusionPipeline, settings: FitSettings, prompts: Sequence[str], frame: FewStepRecipe
) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": list(prompts)}
    for name in ("height", "width"):
        if getattr(settings, name) is not None:
            given[name] = getattr(settings, name)
    return fill_arguments(type(pipe), given, frame, num_steps=1, seed=None)


def _joined(noises: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(noises))


def _finished(
    problem: Problem,
    objective: str,
    grids: tuple[Grid, ...],
    errors: dict[int, tuple[float, float]],
) -> FewStepRecipe:
    settings = asdict(problem.settings)
    digest = hashlib.sha256(json.dumps([objective, settings], sort_keys=True).encode()).hexdigest()
    scores = {}
    for count, (error, plain) in errors.items():
        scores |= {f"mse_{count}_calls": error, f"mse_{count}_calls_plain": plain}
    provenance = Provenance(
        objective=(
            f"{objective}, training-free: {problem.settings.teacher_steps}-step teacher, "
            f"{len(problem.settings.prompts)} pictures, seed {problem.settings.seed}"
        ),
        teacher=f"{problem.name}, guidance {problem.guidance.scale:g}",
        config_hash=digest,
        scores=scores,
        source=SOURCES[objective],
        created_by=f"fewstep {fewstep.__version__}",
    )
    return _recipe(problem.base, problem.guidance, grids, provenance)


def _recipe(
    base: Base,
    guidance: Guidance,
    grids: tuple[Grid, ...],
    provenance: Provenance | None = None,
) -> FewStepRecipe:
    return FewStepRecipe(
        base=base,
        grids=grids,
        default_steps=grids[-1].num_steps,
        guidance=guidance,
        provenance=provenance or Provenance(),
    )


def _fields(base: Base) -> dict[str, Any]:
    return {name: getattr(base, name) for name in Base.__dataclass_fields__}
