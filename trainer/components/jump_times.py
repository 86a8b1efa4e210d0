"""Times of a jump: from t to s, and through which levels the target goes; one draw per sample.

    t = stops[0] > ... > u = stops[-1] >= s = end

The transport takes the sample along the stops from t to u, the bootstrap from u to s. Laws on a
ladder (the teacher's grid) draw whole steps of it, laws on the clock draw positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.components.flow_view import jump_levels
from fewstep.trainer.components.grids import ANY_EXIT, ExitLaw, GridLaw, StudentPath
from fewstep.trainer.components.taus import Density, Uniform
from fewstep.trainer.components.trajectory import substeps
from fewstep.trainer.context import StepContext
from fewstep.trainer.draws import Draws
from fewstep.trainer.levels import Levels


@dataclass(frozen=True, slots=True)
class JumpTimes:
    """One draw.

    Attributes:
        stops: From t to u, B values each.
        end: s.
    """

    stops: tuple[Levels, ...]
    end: Levels

    @property
    def start(self) -> Levels:
        """t."""
        return self.stops[0]

    @property
    def middle(self) -> Levels:
        """u."""
        return self.stops[-1]

    def like(self, sample: Tensor) -> "JumpTimes":
        """The same, broadcastable to `sample`."""
        return JumpTimes(tuple(stop.like(sample) for stop in self.stops), self.end.like(sample))


class TimesLaw(ABC):
    """Interface: draws t, u and s for a batch."""

    @abstractmethod
    def draw(self, context: StepContext) -> JumpTimes:
        """The times of this update."""


@dataclass(frozen=True, slots=True)
class SegmentTimes(TimesLaw):
    """t on a ladder, u one rung below, s the end of t's segment: PCM, TSCD; one segment is LCM.

    Attributes:
        ladder: The teacher's grid.
        segments: Equal parts of it.
        random_end: s is any rung from u to the segment's end (TCD's trajectories), not its end.
        name: Of its draws.
    """

    ladder: StudentPath
    segments: int = 1
    random_end: bool = False
    name: str = "jump"

    def __post_init__(self) -> None:
        if self.ladder.num_steps % self.segments:
            raise ConfigError(
                f"a ladder of {self.ladder.num_steps} steps has no {self.segments} equal segments; "
                "choose a multiple"
            )

    def draw(self, context: StepContext) -> JumpTimes:
        draws = context.draws
        width = self.ladder.num_steps // self.segments
        start = draws.integers(f"{self.name}/t", self.ladder.num_steps)
        end = (start // width + 1) * width
        if self.random_end:
            u = draws.uniform(f"{self.name}/s").double().cpu()
            end = start + 1 + ((end - start) * u).long()
        stops = (rungs(self.ladder, start, draws), rungs(self.ladder, start + 1, draws))
        return JumpTimes(stops, rungs(self.ladder, end, draws))


@dataclass(frozen=True, slots=True)
class MergedSteps(TimesLaw):
    """Several rungs of a ladder become one step, t -> u = s: progressive distillation has two.

    Attributes:
        ladder: The teacher's grid.
        merged: Its steps in one step of the student.
        name: Of its draws.
    """

    ladder: StudentPath
    merged: int = 2
    name: str = "jump"

    def draw(self, context: StepContext) -> JumpTimes:
        draws, count = context.draws, self.ladder.num_steps // self.merged
        first = self.merged * draws.integers(f"{self.name}/t", count)
        stops = tuple(rungs(self.ladder, first + k, draws) for k in range(self.merged + 1))
        return JumpTimes(stops, stops[-1])


@dataclass(frozen=True, slots=True)
class UnionTimes(TimesLaw):
    """t on a ladder, u one rung below, s on any of several grids, not far below u (TDD).

    Attributes:
        ladder: The teacher's grid.
        targets: Grids whose levels s may be.
        reach: Furthest s below u, share of the clock; the nearest target where none is so near.
        name: Of its draws.

    Source:
        TDD, arXiv:2409.01347 (RedAIGC/Target-Driven-Distillation): grids of 4 to 8 steps, reach
        0.26; without its jitter of s.
    """

    ladder: StudentPath
    targets: tuple[StudentPath, ...]
    reach: float = 0.26
    name: str = "jump"

    def draw(self, context: StepContext) -> JumpTimes:
        draws, schedule = context.draws, context.backbone.schedule
        start = draws.integers(f"{self.name}/t", self.ladder.num_steps)
        clock = schedule.uniform_timesteps(1)[0]
        found = {level.timestep: level for path in self.targets for level in path.levels}
        union = StudentPath(tuple(found[t] for t in sorted(found, reverse=True)), schedule, 0.0)
        values = torch.tensor([level.timestep for level in union.levels], dtype=torch.float64)
        middle = torch.tensor([level.timestep for level in self.ladder.levels]).double()[start + 1]
        below = values[None] <= middle[:, None]
        near = below & (values[None] >= middle[:, None] - self.reach * clock)
        first = below.double().argmax(1)
        count = near.sum(1).clamp(min=1)
        u = draws.uniform(f"{self.name}/s").double().cpu()
        end = first + (count * u).long()
        stops = (rungs(self.ladder, start, draws), rungs(self.ladder, start + 1, draws))
        return JumpTimes(stops, rungs(union, end, draws))


class Between(ABC):
    """Interface: where u lies between t and s, as clock positions (B,), float64."""

    @abstractmethod
    def position(self, t: Tensor, s: Tensor, draws: Draws, name: str) -> Tensor:
        """Positions s <= u <= t."""


@dataclass(frozen=True, slots=True)
class BelowStart(Between):
    """u = t - delta: the consistency of neighbours."""

    delta: float

    def position(self, t: Tensor, s: Tensor, draws: Draws, name: str) -> Tensor:
        return torch.maximum(t - self.delta, s)


@dataclass(frozen=True, slots=True)
class AboveEnd(Between):
    """u = s + delta: the jump's own end moves along the teacher (Lagrangian)."""

    delta: float

    def position(self, t: Tensor, s: Tensor, draws: Draws, name: str) -> Tensor:
        return torch.minimum(s + self.delta, t)


@dataclass(frozen=True, slots=True)
class Anywhere(Between):
    """u uniform between them: two jumps make one (semigroup)."""

    def position(self, t: Tensor, s: Tensor, draws: Draws, name: str) -> Tensor:
        return s + (t - s) * draws.uniform(f"{name}/u").double()


@dataclass(frozen=True, slots=True)
class ClockTimes(TimesLaw):
    """t and s anywhere on the clock.

    Attributes:
        between: Where u is.
        density: Of both; t is the larger draw.
        low: Lowest t.
        high: Highest t; low = high fixes it (1: all jumps start at noise).
        reach: Largest t - s (restricted MeanFlow).
        equal: Share of samples with s = t.
        name: Of its draws.
    """

    between: Between
    density: Density = Uniform()
    low: float = 0.02
    high: float = 1.0
    reach: float = 1.0
    equal: float = 0.0
    name: str = "jump"

    def draw(self, context: StepContext) -> JumpTimes:
        draws, schedule = context.draws, context.backbone.schedule
        one, other = (
            self.density.quantile(draws.uniform(f"{self.name}/{k}").double().cpu(), 0.0, schedule)
            for k in ("t", "s")
        )
        t, s = torch.maximum(one, other), torch.minimum(one, other)
        t = t.clamp(self.low, self.high)
        s = torch.maximum(torch.minimum(s, t), t - self.reach)
        is_equal = draws.uniform(f"{self.name}/equal").cpu() < self.equal
        s = torch.where(is_equal, t, s).to(draws.device)
        t = t.to(draws.device)
        u = self.between.position(t, s, draws, self.name)
        stops = (jump_levels(schedule, t), jump_levels(schedule, u))
        return JumpTimes(stops, jump_levels(schedule, s))


@dataclass(frozen=True, slots=True)
class Place:
    """A step of the student's grid, the same for the whole batch.

    Attributes:
        grid: Which grid.
        exit: Which of its steps.
        name: Of its draws.
    """

    grid: GridLaw
    exit: ExitLaw = ANY_EXIT
    name: str = "jump"

    def draw(self, context: StepContext) -> tuple[StudentPath, int]:
        """The grid, and the index of the step."""
        path = self.grid.draw(context.draws, self.name)
        index = self.exit.draw(context.draws, self.name, path.num_steps, context.progress)
        return path, index


@dataclass(frozen=True, slots=True)
class StepTimes(TimesLaw):
    """t and u = s are the ends of a step of the student's grid.

    Attributes:
        place: Which step.
        substeps: Steps of the transport in it, evenly spaced on the clock.
    """

    place: Place
    substeps: int = 1

    def draw(self, context: StepContext) -> JumpTimes:
        path, index = self.place.draw(context)
        levels = substeps(path, path.levels[index], path.levels[index + 1], self.substeps)
        stops = tuple(context.levels(level) for level in levels)
        return JumpTimes(stops, stops[-1])


def rungs(ladder: StudentPath, index: Tensor, draws: Draws) -> Levels:
    """Levels of a ladder at `index`, shape (B,)."""
    table = torch.tensor(
        [(level.timestep, level.alpha, level.sigma) for level in ladder.levels],
        dtype=torch.float64,
    )
    timestep, alpha, sigma = table[index].float().to(draws.device).unbind(1)
    return Levels(timestep, alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1))
