"""Rollouts: the samples at which the student is trained.

Only the exit step may carry a gradient; the steps before it never do.

Source:
    Yin et al. 2024 (DMD2), arXiv:2405.14867, section 4.5 (backward simulation).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level
from fewstep.trainer.components.grids import ANY_EXIT, ExitLaw, GridLaw, StudentPath
from fewstep.trainer.components.sizes import enlarged, real_like, shape_at
from fewstep.trainer.levels import level_at, position_of

if TYPE_CHECKING:
    from fewstep.trainer.context import StepContext


@dataclass(frozen=True, slots=True)
class Rolled:
    """Where a rollout stopped, and the student's step there.

    Attributes:
        sample: The student's input, shape (B, ...), no gradient.
        x0: Its prediction, float32; carries the gradient if one was asked for.
        end: Where its step arrives, at `following`; carries the same gradient.
        index: The step on the grid.
        path: The grid.
        start: The noise the trajectory began with, shape (B, ...); None where it began elsewhere.
    """

    sample: Tensor
    x0: Tensor
    end: Tensor
    index: int
    path: StudentPath
    start: Tensor | None = None

    @property
    def now(self) -> Level:
        """Level of `sample`."""
        return self.path.levels[self.index]

    @property
    def following(self) -> Level:
        """Level of `end`."""
        return self.path.levels[self.index + 1]

    @property
    def position(self) -> float:
        """Clock position of `sample`, 0 to 1."""
        return position_of(self.path.schedule, self.now)

    @property
    def end_position(self) -> float:
        """Clock position of `end`."""
        return position_of(self.path.schedule, self.following)


class Rollout(ABC):
    """Interface: makes the student's input and asks it there."""

    needs_data: bool = False
    """Whether it starts from real latents."""

    @abstractmethod
    def run(self, context: "StepContext") -> Rolled:
        """Roll out; the exit step carries a gradient where `context.with_grad`."""


@dataclass(frozen=True, slots=True)
class StudentRollout(Rollout):
    """The student samples its own trajectory from noise (backward simulation), without any data.

    Attributes:
        grid: Which grid.
        exit: At which of its steps to stop.
        name: Of its draws: terms with rollouts of other names see other trajectories.
        pick: Of the draw of its exit, where terms see different steps of one trajectory (CDM);
            empty takes `name`. The steps before the exit are then walked once.
    """

    grid: GridLaw
    exit: ExitLaw = ANY_EXIT
    name: str = "rollout"
    pick: str = ""

    def run(self, context: "StepContext") -> Rolled:
        path = self.grid.draw(context.draws, self.name)
        exit_index = self.exit.draw(
            context.draws, self.pick or self.name, path.num_steps, context.progress
        )
        start = context.normal(f"{self.name}/noise", path.size(0))
        sample = student_sample(context, self.grid, self.name, path, exit_index)
        return exit_step(context, self.name, path, exit_index, sample, start)


@dataclass(frozen=True, slots=True)
class DataRollout(Rollout):
    """The student is asked at noised real latents on a step of its grid (FastGen, CausVid).

    Where samples grow, the latents are reduced to the step before and enlarged again, as blurred as
    the student's own would be (SwD).

    Attributes:
        grid: Which grid.
        exit: At which of its steps.
        name: Of its draws.
    """

    grid: GridLaw
    exit: ExitLaw = ANY_EXIT
    name: str = "data"
    needs_data = True

    def run(self, context: "StepContext") -> Rolled:
        path = self.grid.draw(context.draws, self.name)
        index = self.exit.draw(context.draws, self.name, path.num_steps, context.progress)
        start = context.normal(f"{self.name}/noise", path.size(index))
        x0 = real_like(context, shape_at(context.shape, path.size(max(0, index - 1))))
        if path.size(index) != path.size(max(0, index - 1)):
            x0 = enlarged(x0, tuple(start.shape[1:]))
        sample = sampling.add_noise(x0, start, path.levels[index])
        return exit_step(context, self.name, path, index, sample, start)


@dataclass(frozen=True, slots=True)
class RealLatents(Rollout):
    """No student at all: the update's real latents stand for its result.

    A critic that learns from it becomes a denoiser of the data, as plain fine-tuning makes one.

    Attributes:
        grid: Only for its schedule; the whole clock is noisier than clean data.
    """

    grid: GridLaw
    needs_data = True

    def run(self, context: "StepContext") -> Rolled:
        path = self.grid.draw(context.draws, "real")
        x0 = context.real.x0
        return Rolled(x0, x0, x0, path.num_steps - 1, path)


@dataclass(frozen=True, slots=True)
class Either(Rollout):
    """One of two rollouts, by a coin that is the same for the whole batch (SenseFlow: half, half).

    Attributes:
        first: Taken with probability `share`.
        second: Taken otherwise.
        share: 0 to 1.
    """

    first: Rollout
    second: Rollout
    share: float = 0.5

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.first.needs_data or self.second.needs_data

    def run(self, context: "StepContext") -> Rolled:
        coin = float(torch.rand((), generator=context.draws.shared("either")))
        return (self.first if coin < self.share else self.second).run(context)


@dataclass(frozen=True, slots=True)
class OffPath(Rollout):
    """A point beside the student's trajectory: its step carried on too far or not far enough.

        x' = x_t + (sigma' - sigma_t) sg(v),   sigma' at a uniform clock position

    written for any schedule as the deterministic step to sigma' with the student's own x0. The
    student is asked there.

    Attributes:
        around: The rollout whose step is carried on.
        low: Lowest clock position.
        high: Highest.

    Source:
        CDM, arXiv:2605.06376, off-trajectory matching on latents extrapolated by the student.
    """

    around: Rollout
    low: float = 0.02
    high: float = 0.98

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.around.needs_data

    def run(self, context: "StepContext") -> Rolled:
        with torch.no_grad():
            rolled = self.around.run(context.without_grad())
        u = float(torch.rand((), generator=context.draws.shared("off-path")))
        schedule = rolled.path.schedule
        level = level_at(schedule, self.low + (self.high - self.low) * u)
        sample = sampling.step(rolled.sample, rolled.x0, rolled.now, level, None, level)
        end = rolled.path.levels[-1]
        path = StudentPath((level, end), schedule, rolled.path.stochasticity)
        return exit_step(context, "off-path", path, 0, sample, None)


def student_sample(
    context: "StepContext", grid: GridLaw, name: str, path: StudentPath, index: int
) -> Tensor:
    """The student's own sample at a step of its trajectory, without gradient.

    Args:
        context: The update; it remembers the trajectories that were walked.
        grid: The law the grid came from.
        name: Of the trajectory's draws.
        path: The grid.
        index: The step.
    """
    samples = context.walk(grid, name)
    if not samples:
        samples.append(path.levels[0].sigma * context.normal(f"{name}/noise", path.size(0)))
    for k in range(len(samples) - 1, index):
        with torch.no_grad():
            x0 = context.student_x0(samples[k], path.levels[k], path.levels[k + 1])
        samples.append(path.advance(samples[k], x0, k, step_noise(context, name, path, k)))
    return samples[index]


def exit_step(
    context: "StepContext",
    name: str,
    path: StudentPath,
    index: int,
    sample: Tensor,
    start: Tensor | None,
) -> Rolled:
    """Ask the student at the exit step and take its step."""
    with torch.set_grad_enabled(context.with_grad):
        x0 = context.student_x0(sample, path.levels[index], path.levels[index + 1])
        end = path.advance(sample, x0, index, step_noise(context, name, path, index))
    return Rolled(sample, x0, end, index, path, start)


def step_noise(context: "StepContext", name: str, path: StudentPath, index: int) -> Tensor | None:
    """Fresh noise for the step that leaves `index`, None where it draws none."""
    if not path.needs_noise(index):
        return None
    return context.normal(f"{name}/noise/{index}", path.size(index + 1))
