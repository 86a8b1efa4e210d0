"""The grid a scheduler runs and how far it is: what every step and every look-up goes by."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.recipe import FewStepRecipe
from fewstep.trajectory import PlannedStep

GRID_TOLERANCE = 1 / 128
"""Relative; half the spacing of bfloat16, in which some pipelines carry their timesteps."""


class InstalledGrid:
    """The part of FewStepScheduler that knows the planned steps and which one is next.

    Attributes:
        before_call: Told the planned step whose network call comes next; switches phase experts.
        timesteps: What pipelines loop over.
        sigmas: Those of the levels, on the CPU for indexing without a sync.
        num_inference_steps: How many steps there are.
    """

    recipe: FewStepRecipe
    before_call: Callable[[PlannedStep], None] | None
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int
    _schedule: NoiseSchedule
    _plan: tuple[PlannedStep, ...]
    _levels: tuple[Level, ...]
    _step_index: int | None
    _begin_index: int | None
    _previous: tuple[Tensor, Tensor] | None

    @property
    def levels(self) -> tuple[Level, ...]:
        """The N + 1 levels of the grid in use, float64."""
        return self._levels

    @property
    def plan(self) -> tuple[PlannedStep, ...]:
        """The N planned steps of the grid in use."""
        return self._plan

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
        self._step_index = self._begin_index = self._previous = None
        self._announce(0)

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
