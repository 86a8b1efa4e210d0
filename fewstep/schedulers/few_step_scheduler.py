"""FewStepScheduler: a diffusers scheduler whose grid and step rule come from a recipe.

It owns the final (timestep, sigma) table. Pipelines may pass sigmas, mu or timesteps of their own
making; stock schedulers re-shift or re-derive them, differently in every release, so here only
their number counts. The arithmetic is `fewstep.sampling`; nothing of it is repeated.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from fewstep.errors import PipelineError, ShapeError
from fewstep.noise_schedule import Level
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.sampling import Prediction, to_x0
from fewstep.schedulers.fresh_noise import Generators, NoiseLayout, draw_normal
from fewstep.schedulers.scale_ladder import ScaleLadder
from fewstep.start_rules import snap_start
from fewstep.trajectory import PlannedStep, advance

DIFFUSERS_PREDICTIONS: dict[Prediction, str] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
    "trigflow": "trigflow",
}
GRID_TOLERANCE = 1 / 128
"""Relative; half the spacing of bfloat16, in which some pipelines carry their timesteps."""


@dataclass
class FewStepSchedulerOutput(BaseOutput):
    """What one step gives.

    Attributes:
        prev_sample: The sample at the next level. Shape and dtype of the input sample.
        pred_original_sample: Predicted clean data, x0. Same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Samples by a recipe in any stock diffusers pipeline.

    Args:
        recipe: A `FewStepRecipe`, or its JSON value (as `scheduler_config.json` holds it).
        num_train_timesteps: Ignored, the recipe knows; kept readable in `config` for pipelines.
        prediction_type: Likewise.

    Attributes:
        recipe: The recipe it obeys.
        replaced: The stock scheduler whose place it took, for giving that back.
        before_call: Told the planned step whose network call comes next; switches phase experts.
        refine_x0: Given predicted clean data and its planned step, returns what to use instead.

    Raises:
        RecipeError: The recipe breaks its own rules.
        PipelineError: The recipe needs a sampler this scheduler is not.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        recipe: FewStepRecipe | Mapping[str, Any],
        num_train_timesteps: int | None = None,
        prediction_type: str | None = None,
    ) -> None:
        if not isinstance(recipe, FewStepRecipe):
            recipe = FewStepRecipe.from_json(json.dumps(recipe))
        _check_is_supported(recipe)
        self.recipe = recipe
        self.register_to_config(
            recipe=json.loads(recipe.to_json()),
            num_train_timesteps=recipe.base.schedule.num_train_timesteps,
            prediction_type=DIFFUSERS_PREDICTIONS[recipe.base.prediction],
            **_read_by_pipelines(recipe),
        )
        self._schedule = recipe.base.schedule.build()
        self._generator: Generators = None
        self._layouts: dict[tuple[int, ...], NoiseLayout] = {}
        self._ladder = ScaleLadder()
        self.replaced: SchedulerMixin | None = None
        self.before_call: Callable[[PlannedStep], None] | None = None
        self.refine_x0: Callable[[Tensor, PlannedStep], Tensor] | None = None
        self.set_timesteps()

    def __len__(self) -> int:
        return self.recipe.base.schedule.num_train_timesteps

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines of the VP family multiply the first noise with (`sampler.first_noise`).

        The trainer's rollout starts from alpha * 0 + sigma * noise; at t = 999 of Stable Diffusion
        this is 0.998, at a start below T it is less. Flow pipelines never read this.
        """
        return first_noise_scale(self.recipe, self._levels[0])

    @property
    def is_flow(self) -> bool:
        """Whether pipelines of this kind leave the first noise unscaled."""
        return self.recipe.base.schedule.kind == "flow"

    @property
    def levels(self) -> tuple[Level, ...]:
        """The N + 1 levels of the grid in use, float64."""
        return self._levels

    @property
    def plan(self) -> tuple[PlannedStep, ...]:
        """The N planned steps of the grid in use."""
        return self._plan

    @property
    def ladder(self) -> ScaleLadder:
        """Sizes of samples that grow from step to step, of the image in work."""
        return self._ladder

    @property
    def step_index(self) -> int | None:
        """Index of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the pipeline said it starts (image to image starts inside the grid)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the grid instead of looking the first timestep up."""
        self._begin_index = begin_index
        self._announce(begin_index)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        original_inference_steps: int | None = None,
        strength: float | None = None,
    ) -> None:
        """Install one of the recipe's grids.

        Args:
            num_inference_steps: Step count; None means the length of `sigmas` or `timesteps`, else
                the recipe's default.
            device: Where `timesteps` go; `sigmas` stay on the CPU for indexing without a sync.
            sigmas: Only their number counts (FLUX, SD3, Qwen-Image and Z-Image pipelines pass it).
            mu: The pipeline's shift for the image size; followed only where the recipe has a
                `resolution_shift` (whose numbers the pipeline read from `config`).
            timesteps: As `sigmas`.
            max_timesteps: Ignored; SANA-Sprint passes it.
            intermediate_timesteps: Likewise.
            original_inference_steps: Ignored; the latent consistency pipelines pass it.
            strength: Image to image of those: only the grid from this start on (`snap_start`).

        Raises:
            RecipeError: The model was not made for this step count.
        """
        count = num_inference_steps
        for given in (sigmas, timesteps):
            if count is None and given is not None:
                count = len(given)
        self._is_unshifted = self.recipe.resolution_shift is not None and mu is None
        plan = plan_steps(self.recipe, count, mu=mu)
        if strength is not None:
            plan = plan[snap_start(self.recipe, plan, strength).index :]
        self.install_plan(plan, device)

    def install_plan(
        self, plan: tuple[PlannedStep, ...], device: str | torch.device | None = None
    ) -> None:
        """Take these steps in place of the grid's (image to image begins with one of its own).

        Args:
            plan: One or more planned steps, each starting where the one before ends.
            device: As in `set_timesteps`.
        """
        self._plan = plan
        self._levels = (*(p.level for p in self._plan), self._plan[-1].following)
        self.num_inference_steps = len(self._plan)
        # SANA-Sprint alone drops the last timestep itself.
        told = self._levels if self._is_trigflow else self._levels[:-1]
        self.timesteps = torch.tensor([level.timestep for level in told], device=device)
        self.sigmas = torch.tensor([level.sigma for level in self._levels])
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._previous: tuple[Tensor, Tensor] | None = None
        self._announce(0)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: networks here see x_t = alpha * x0 + sigma * epsilon unscaled."""
        return sample

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Index of the grid's timestep nearest to this one, however it was rounded on the way.

        Raises:
            PipelineError: No timestep of the grid is near.
        """
        known = self.timesteps if schedule_timesteps is None else schedule_timesteps
        grid, wanted = known.tolist(), float(timestep)
        index = min(range(len(grid)), key=lambda i: abs(grid[i] - wanted))
        if abs(grid[index] - wanted) > max(self._half_tick, GRID_TOLERANCE * abs(wanted)):
            raise PipelineError(
                f"timestep {wanted:g} is not in this recipe's grid {[round(t, 1) for t in grid]}; "
                "pass the timesteps of the scheduler"
            )
        return index

    def __deepcopy__(self, memo: dict[int, Any]) -> "FewStepScheduler":
        # LTX-2 copies its scheduler for the audio inside a call: the copy draws from the same
        # generators (they cannot be copied) and shares the hooks, whose owner may be a model.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {id(self._generator), id(self.refine_x0)}
        if id(getattr(self.before_call, "__self__", None)) not in memo:
            shared.add(id(self.before_call))
        for name, value in vars(self).items():
            vars(twin)[name] = value if id(value) in shared else copy.deepcopy(value, memo)
        return twin

    @contextmanager
    def bound(self, generator: Generators) -> Iterator[None]:
        """Inside, steps draw fresh noise from these generators.

        Most pipelines (SD3, FLUX, Qwen-Image, Wan, Z-Image, ...) never hand their generator to
        `step`; without this a re-noising sampler would not repeat for the same seed.

        Args:
            generator: One for the whole batch, or one per image.
        """
        before, self._generator = self._generator, generator
        self._layouts.clear()
        try:
            yield
        finally:
            self._generator = before
            self._layouts.clear()
            self._ladder = ScaleLadder()
            self._previous = None

    def add_noise_layout(self, packed_shape: tuple[int, ...], layout: NoiseLayout) -> None:
        """Tell how fresh noise for samples of one packed shape is made; forgotten after `bound`.

        Args:
            packed_shape: One image's latents as the pipeline packs them.
            layout: From the image-shaped draw to that.
        """
        self._layouts[packed_shape] = layout

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        *,
        return_dict: Literal[False],
        per_token_timesteps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: Literal[True] = True,
        per_token_timesteps: Tensor | None = None,
    ) -> FewStepSchedulerOutput: ...

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> FewStepSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the grid; the arithmetic is float32 (float64 for float64 samples).

        There is no `eta` on purpose: pipelines pass their default of 0 to every scheduler that
        names it, which would silence the recipe's stochasticity.

        Args:
            model_output: What the network said, guidance applied. Shape of `sample`.
            timestep: Looked up only if neither a step nor `set_begin_index` came before.
            sample: The noisy sample. Shape (B, ...), any float dtype.
            generator: Wins over `bound`; only looked at by steps that add noise.
            return_dict: False gives (prev_sample, pred_original_sample).
            per_token_timesteps: Passed by LTX's conditioned pipelines, whose output is then the
                velocity negated. Its values are not looked at: those pipelines keep the tokens
                that are at another time than the grid's.

        Raises:
            PipelineError: Called more often than the grid has steps.
            ShapeError: Output and sample have different shapes.
        """
        if model_output.shape != sample.shape:
            raise ShapeError(
                f"the network gave shape {tuple(model_output.shape)} for a sample of "
                f"{tuple(sample.shape)}; wanted equal shapes (drop a learned variance first)"
            )
        if self._is_unshifted:
            raise PipelineError(
                "this recipe's grid depends on the image size, but the pipeline passed no mu; use "
                "a pipeline class that computes one, or pass mu to set_timesteps"
            )
        if per_token_timesteps is not None:
            model_output = -model_output
        index = self._next_index(timestep)
        planned = self._plan[index]
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        wide = sample.to(dtype)
        x0 = to_x0(self.recipe.base.prediction, model_output.to(dtype), wide, planned.reading)
        if self.refine_x0 is not None:
            x0 = self.refine_x0(x0, planned).to(dtype)
        before = (wide, x0)
        if planned.following_size != planned.size:
            wide = x0 = self._ladder.climb(x0, planned)  # re-noised: the old sample has no weight
        noise = None
        if planned.needs_noise:
            noise = self.draw_noise(wide, generator if generator is not None else self._generator)
        moved = advance(planned, wide, x0, noise, self._previous)
        self._previous = before
        self._step_index = index + 1
        self._announce(index + 1)
        # The sample's dtype, not the network's: Wan and Z-Image keep float32 latents over a
        # half-precision network, and rounding them at every step would lose what they keep.
        previous, x0 = moved.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return previous, x0
        return FewStepSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha * x0 + sigma * noise` at given timesteps.

        Timesteps of the grid get the grid's own levels, others the schedule's.

        Args:
            original_samples: Clean data. Shape (B, ...).
            noise: Standard normal, same shape.
            timesteps: One for all, or one per sample.
        """
        levels = [self._level_at(t) for t in torch.as_tensor(timesteps).flatten().tolist()]
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha = torch.tensor([level.alpha for level in levels], dtype=torch.float64)
        sigma = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
        alpha = alpha.to(original_samples).reshape(shape)
        return alpha * original_samples + sigma.to(original_samples).reshape(shape) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and in the order that flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def _next_index(self, timestep: float | Tensor) -> int:
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if index >= len(self._levels) - 1:
            raise PipelineError(
                f"step was called more often than this grid's {len(self._levels) - 1} steps; "
                "call set_timesteps before every image"
            )
        return index

    def _level_at(self, timestep: float) -> Level:
        nearest = min(self._levels[:-1], key=lambda level: abs(level.timestep - timestep))
        if abs(nearest.timestep - timestep) < self._half_tick:
            return nearest
        return self._schedule.level(timestep)

    @property
    def _is_trigflow(self) -> bool:
        return self.recipe.base.schedule.kind == "trigflow"

    @property
    def _half_tick(self) -> float:
        return math.pi / 4000 if self._is_trigflow else 0.5

    def _announce(self, index: int) -> None:
        if self.before_call is not None and index < len(self._plan):
            self.before_call(self._plan[index])

    def draw_noise(self, sample: Tensor, generator: Generators) -> Tensor:
        """Standard normals for a sample in the pipeline's layout, drawn image-shaped.

        Args:
            sample: Shape (B, ...); only its shape and device are looked at.
            generator: One for the batch, or one per image.
        """
        batch, *shape = sample.shape
        layout = self._layouts.get(tuple(shape))
        if layout is None:
            noise = draw_normal((batch, *shape), generator)
        else:
            noise = layout.pack(draw_normal((batch, *layout.shape), generator))
        # SANA-Sprint's samples are TrigFlow's times the deviation of its data.
        deviation = self.recipe.base.schedule.sigma_data
        return (noise if deviation is None else deviation * noise).to(sample.device)


def _check_is_supported(recipe: FewStepRecipe) -> None:
    if recipe.sampler.kind != "step":
        raise PipelineError(
            f"this recipe's sampler is {recipe.sampler.kind!r}, but FewStepScheduler runs 'step'; "
            "sample it with the pipeline of its authors"
        )


def _read_by_pipelines(recipe: FewStepRecipe) -> dict[str, Any]:
    """Config entries that stock pipelines look at to compute mu, or to scale their samples."""
    read: dict[str, Any] = {}
    if recipe.base.schedule.sigma_data is not None:
        read["sigma_data"] = recipe.base.schedule.sigma_data
    shift = recipe.resolution_shift
    if shift is not None:
        read["use_dynamic_shifting"] = True
        if shift.rule == "interpolated":
            read |= {
                "base_shift": shift.base_shift,
                "max_shift": shift.max_shift,
                "base_image_seq_len": shift.base_tokens,
                "max_image_seq_len": shift.max_tokens,
            }
    return read
