"""The student's steps: its grid, how a training step draws one, and where a rollout stops."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, levels_of
from fewstep.trainer.components.sizes import enlarged
from fewstep.trainer.draws import Draws


@dataclass(frozen=True, slots=True)
class StudentPath:
    """One grid of the student: what is trained is what the recipe stores.

    Attributes:
        levels: N + 1 levels.
        schedule: Of the base.
        stochasticity: 0 ODE steps, 1 re-noising, between TCD's gamma.
        sizes: Height and width of each step's sample as a share of the full size, rising to 1
            (SwD); empty: all full.
    """

    levels: tuple[Level, ...]
    schedule: NoiseSchedule
    stochasticity: float
    sizes: tuple[float, ...] = ()

    @property
    def num_steps(self) -> int:
        """Student steps."""
        return len(self.levels) - 1

    def size(self, index: int) -> float:
        """Share of the full height and width at level `index`, 0 to N."""
        return (*self.sizes, 1.0)[index] if self.sizes else 1.0

    def advance(self, sample: Tensor, x0: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """One grid step with the one step function; where samples grow, x0 is enlarged first."""
        now, following = self.levels[index], self.levels[index + 1]
        via = self.schedule.via(following, self.stochasticity)
        if noise is not None and self.size(index) != self.size(index + 1):
            x0 = enlarged(x0, tuple(noise.shape[1:]))
            sample = x0  # its weight is zero: what is re-noised does not remember the sample
        return sampling.step(sample, x0, now, following, noise, via)

    def needs_noise(self, index: int) -> bool:
        """Whether the step that leaves `index` draws fresh noise."""
        return self.stochasticity > 0.0 and self.levels[index + 1].sigma > 0.0


def even_path(
    schedule: NoiseSchedule, num_steps: int, *, shift: float = 1.0, stochasticity: float = 0.0
) -> StudentPath:
    """The evenly spaced grid of a schedule, shifted once for flow, ending at clean data."""
    shaped = Flow(shift, schedule.num_train_timesteps) if isinstance(schedule, Flow) else schedule
    timesteps = shaped.uniform_timesteps(num_steps)
    sigmas = [shaped.sigma_of_timestep(t) for t in timesteps]
    return StudentPath(levels_of(schedule, timesteps, [*sigmas, 0.0]), schedule, stochasticity)


def listed_path(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], *, stochasticity: float = 0.0
) -> StudentPath:
    """The grid of these timesteps, already shifted, ending at clean data."""
    sigmas = [schedule.sigma_of_timestep(t) for t in timesteps]
    return StudentPath(levels_of(schedule, timesteps, [*sigmas, 0.0]), schedule, stochasticity)


class GridLaw(ABC):
    """Interface: which grid a training step uses; one for the whole batch."""

    @abstractmethod
    def draw(self, draws: Draws, name: str) -> StudentPath:
        """The grid of this update."""


@dataclass(frozen=True, slots=True)
class FixedGrid(GridLaw):
    """Always the same grid."""

    path: StudentPath

    def draw(self, draws: Draws, name: str) -> StudentPath:
        return self.path


@dataclass(frozen=True, slots=True)
class GridChoice(GridLaw):
    """One of several grids: an adapter that is good at several step counts.

    Attributes:
        paths: The grids, drawn with equal probability.
    """

    paths: tuple[StudentPath, ...]

    def draw(self, draws: Draws, name: str) -> StudentPath:
        return self.paths[draws.shared_integer(f"{name}/grid", 0, len(self.paths))]


@dataclass(frozen=True, slots=True)
class RandomGrid(GridLaw):
    """A new grid each time: random step count, interior positions uniform and sorted (CDM).

    Attributes:
        schedule: Of the base.
        least: Fewest steps.
        most: Most steps.
        low: Lowest interior position of the clock, 0 to 1.
        high: Highest.

    Source:
        CDM, arXiv:2605.06376, and byliutao/cdm: n in 1..28, interior sigmas uniform in
        (0.25, 0.95), deterministic.
    """

    schedule: NoiseSchedule
    least: int = 1
    most: int = 28
    low: float = 0.25
    high: float = 0.95

    def draw(self, draws: Draws, name: str) -> StudentPath:
        generator = draws.shared(f"{name}/grid")
        count = int(torch.randint(self.least, self.most + 1, (), generator=generator))
        inner = self.low + (self.high - self.low) * torch.rand(count - 1, generator=generator)
        first = self.schedule.uniform_timesteps(1)[0]
        # VP clocks are integers: two that round to one would be a step of no length
        clock = [first, *(first * float(p) for p in inner.double().sort(descending=True).values)]
        if not isinstance(self.schedule, Flow):
            clock = sorted({float(round(t)) for t in clock}, reverse=True)
        return listed_path(self.schedule, tuple(clock))


class ExitLaw(ABC):
    """Interface: at which step a rollout stops, the same for all processes."""

    @abstractmethod
    def draw(self, draws: Draws, name: str, num_steps: int, progress: float = 0.0) -> int:
        """The exit step of a grid of so many steps; progress is the share of the stage done."""


@dataclass(frozen=True, slots=True)
class Exit(ExitLaw):
    """At which steps a rollout may stop; drawn uniformly.

    Attributes:
        first: Lowest step; negative counts from the end (-1 is the last).
        last: Highest step, inclusive.
    """

    first: int = 0
    last: int = -1

    def draw(self, draws: Draws, name: str, num_steps: int, progress: float = 0.0) -> int:
        """The exit step of a grid.

        Raises:
            ConfigError: The grid has no such step.
        """
        low = self.first + (num_steps if self.first < 0 else 0)
        high = self.last + (num_steps if self.last < 0 else 0)
        if not 0 <= low <= high < num_steps:
            raise ConfigError(
                f"no exit between step {self.first} and {self.last} on a grid of {num_steps} "
                "steps; use a longer grid"
            )
        return draws.shared_integer(f"{name}/exit", low, high + 1)


@dataclass(frozen=True, slots=True)
class AnnealedExit(ExitLaw):
    """Noisy steps first, all alike at the end: position 1 - u^(1 / (1 + a)), a falling to 0.

    Attributes:
        a: How much the first steps are preferred at the start; `taus.BetaAnnealed` with b = 0.

    Source:
        DMDR, arXiv:2511.13649 (vvvvvjdy/dmdr).
    """

    a: float = 3.0

    def draw(self, draws: Draws, name: str, num_steps: int, progress: float = 0.0) -> int:
        u = float(torch.rand((), generator=draws.shared(f"{name}/exit")))
        position = 1.0 - u ** (1.0 / (1.0 + self.a * max(0.0, 1.0 - progress)))
        return min(int(position * num_steps), num_steps - 1)


ANY_EXIT, LAST_EXIT, NOT_FIRST_EXIT = Exit(), Exit(-1, -1), Exit(1, -1)
