"""FewStepScheduler: a diffusers scheduler whose grid and step rule come from a recipe.

It owns the final (timestep, sigma) table. Pipelines may pass sigmas, mu or timesteps of their own
making; stock schedulers re-shift or re-derive them, differently in every release, so here only
their number counts. The arithmetic is `fewstep.sampling`; nothing of it is repeated.
"""

import copy
import json
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
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.sampling import to_x0
from fewstep.schedulers.fresh_noise import FreshNoise, Generators, NoiseLayout
from fewstep.schedulers.installed_grid import InstalledGrid
from fewstep.schedulers.policy_step import check_not_refined, policy_step
from fewstep.schedulers.scale_ladder import ScaleLadder
from fewstep.schedulers.stock_config import DIFFUSERS_PREDICTIONS, read_by_pipelines
from fewstep.start_rules import snap_start
from fewstep.trajectory import PlannedStep, advance


@dataclass
class FewStepSchedulerOutput(BaseOutput):
    """What one step gives.

    Attributes:
        prev_sample: The sample at the next level. Shape and dtype of the input sample.
        pred_original_sample: Predicted clean data, x0; after the last step `prev_sample` itself,
            as some pipelines take this one for the picture. Same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FewStepScheduler(InstalledGrid, SchedulerMixin, ConfigMixin):
    """Samples by a recipe in any stock diffusers pipeline.

    Args:
        recipe: A `FewStepRecipe`, or its JSON value (as `scheduler_config.json` holds it).
        num_train_timesteps: Ignored, the recipe knows; kept readable in `config` for pipelines.
        prediction_type: Likewise.

    Attributes:
        recipe: The recipe it obeys.
        replaced: The stock scheduler whose place it took, for giving that back.
        before_call: Told the planned step whose network call comes next; switches phase experts.
        is_target_told: Whether something tells the network where each step ends, which recipes of
            sampler kind "flow_map" need.
        refine_x0: Given predicted clean data and its planned step, returns what to use instead.

    Raises:
        RecipeError: The recipe breaks its own rules.
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
        self.recipe = recipe
        self.register_to_config(
            recipe=json.loads(recipe.to_json()),
            num_train_timesteps=recipe.base.schedule.num_train_timesteps,
            prediction_type=DIFFUSERS_PREDICTIONS[recipe.base.prediction],
            **read_by_pipelines(recipe),
        )
        self._schedule = recipe.base.schedule.build()
        self._fresh_noise = FreshNoise()
        self._ladder = ScaleLadder()
        self.replaced: SchedulerMixin | None = None
        self.before_call: Callable[[PlannedStep], None] | None = None
        self.is_target_told = False
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
    def ladder(self) -> ScaleLadder:
        """Sizes of samples that grow from step to step, of the image in work."""
        return self._ladder

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
            start = snap_start(self.recipe, plan, strength)
            plan = start.plan[start.index :]
        self.install_plan(plan, device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: networks here see x_t = alpha * x0 + sigma * epsilon unscaled."""
        return sample

    def __deepcopy__(self, memo: dict[int, Any]) -> "FewStepScheduler":
        # LTX-2 copies its scheduler for the audio inside a call: the copy shares the hooks, whose
        # owner may be a model.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {id(self.refine_x0)}
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
        with self._fresh_noise.bound(generator):
            try:
                yield
            finally:
                self._ladder = ScaleLadder()
                self._previous = None

    def add_noise_layout(self, packed_shape: tuple[int, ...], layout: NoiseLayout) -> None:
        """Tell how fresh noise for samples of one packed shape is made; forgotten after `bound`.

        Args:
            packed_shape: One image's latents as the pipeline packs them.
            layout: From the image-shaped draw to that.
        """
        self._fresh_noise.layouts[packed_shape] = layout

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
            model_output: What the network said, guidance applied. Shape of `sample`; of a recipe
                with a policy, with more channels (`policy_step`).
            timestep: Looked up only if neither a step nor `set_begin_index` came before.
            sample: The noisy sample. Shape (B, ...), any float dtype.
            generator: Wins over `bound`; only looked at by steps that add noise.
            return_dict: False gives (prev_sample, pred_original_sample).
            per_token_timesteps: Passed by LTX's conditioned pipelines, whose output is then the
                velocity negated. Its values are not looked at: those pipelines keep the tokens
                that are at another time than the grid's.

        Raises:
            PipelineError: Called more often than the grid has steps, or a flow map's network is
                not told where its step ends.
            ShapeError: Output and sample have different shapes.
        """
        policy = self.recipe.sampler.policy
        if policy is None and model_output.shape != sample.shape:
            raise ShapeError(
                f"the network gave shape {tuple(model_output.shape)} for a sample of "
                f"{tuple(sample.shape)}; wanted equal shapes (drop a learned variance first)"
            )
        if self._is_unshifted:
            raise PipelineError(
                "this recipe's grid depends on the image size, but the pipeline passed no mu; use "
                "a pipeline class that computes one, or pass mu to set_timesteps"
            )
        _check_target_is_told(self)
        if per_token_timesteps is not None:
            model_output = -model_output
        index = self._next_index(timestep)
        planned = self._plan[index]
        is_last = index + 1 == len(self._plan)
        wide = sample.to(torch.float64 if sample.dtype == torch.float64 else torch.float32)
        if policy is None:
            moved, x0 = self._plain_step(model_output, wide, planned, generator)
        else:
            check_not_refined(self.refine_x0)
            followed = policy_step(policy, model_output, wide, planned, is_last=is_last)
            moved, x0 = followed.moved, followed.x0
        if is_last:  # LCM, SANA-Sprint and PixArt take x0 as the picture
            x0 = moved
        self._step_index = index + 1
        self._announce(index + 1)
        # The sample's dtype, not the network's: Wan and Z-Image keep float32 latents over a
        # half-precision network, and rounding them at every step would lose what they keep.
        previous, x0 = moved.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return previous, x0
        return FewStepSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _plain_step(
        self, model_output: Tensor, sample: Tensor, planned: PlannedStep, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """A step of one velocity: the sample after it, and x0."""
        output = model_output.to(sample.dtype)
        x0 = to_x0(self.recipe.base.prediction, output, sample, planned.reading)
        if self.refine_x0 is not None:
            x0 = self.refine_x0(x0, planned).to(sample.dtype)
        before = (sample, x0)
        if planned.following_size != planned.size:
            sample = x0 = self._ladder.climb(x0, planned)  # the old sample has no weight
        noise = self.draw_noise(sample, generator) if planned.needs_noise else None
        moved = advance(planned, sample, x0, noise, self._previous)
        self._previous = before
        return moved, x0

    def draw_noise(self, sample: Tensor, generator: Generators) -> Tensor:
        """Standard normals for a sample in the pipeline's layout, drawn image-shaped.

        Args:
            sample: Shape (B, ...); only its shape and device are looked at.
            generator: One for the batch, or one per image; None takes those of `bound`.
        """
        noise = self._fresh_noise.draw(tuple(sample.shape), generator)
        # SANA-Sprint's samples are TrigFlow's times the deviation of its data.
        deviation = self.recipe.base.schedule.sigma_data
        return (noise if deviation is None else deviation * noise).to(sample.device)


def _check_target_is_told(scheduler: FewStepScheduler) -> None:
    if scheduler.recipe.sampler.kind == "flow_map" and not scheduler.is_target_told:
        raise PipelineError(
            "this recipe's sampler is 'flow_map', but nothing tells the network where its step "
            "ends; load the adapter with FewStepPipeline, which installs the head in it"
        )
