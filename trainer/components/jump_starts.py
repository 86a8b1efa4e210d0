"""Where a jump starts: noised data, noise, the teacher's trajectory or the student's own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.trainer.components.jump_times import Place
from fewstep.trainer.components.moves import FixedScale, Ode, ScaleLaw
from fewstep.trainer.components.rollouts import student_sample
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels


class Start(ABC):
    """Interface: samples at levels."""

    needs_data: bool = False
    """Whether it starts from real latents."""

    @abstractmethod
    def sample(self, context: StepContext, now: Levels) -> Tensor:
        """Samples at `now`, shape (B, ...), no gradient."""


@dataclass(frozen=True, slots=True)
class DataStart(Start):
    """Real latents, noised."""

    name: str = "jump"
    needs_data = True

    def sample(self, context: StepContext, now: Levels) -> Tensor:
        x0 = context.real.x0
        return sampling.add_noise(x0, context.normal(f"{self.name}/noise"), now.like(x0))


@dataclass(frozen=True, slots=True)
class NoiseStart(Start):
    """Pure noise at the noisiest level; the times law must start there."""

    name: str = "jump"

    def sample(self, context: StepContext, now: Levels) -> Tensor:
        noise = context.normal(f"{self.name}/noise")
        return now.like(noise).sigma * noise


@dataclass(frozen=True, slots=True)
class TeacherStart(Start):
    """A point of the teacher's trajectory: no data needed (TBCM).

    Attributes:
        num_steps: Guided teacher steps from noise to the point, evenly spaced on the clock.
        scale: Guidance.
        name: Of its draws.

    Source:
        TBCM (hustvl/TBCM): training points from teacher trajectories.
    """

    num_steps: int
    scale: ScaleLaw = FixedScale()
    name: str = "jump"

    @torch.no_grad()
    def sample(self, context: StepContext, now: Levels) -> Tensor:
        schedule, noise = context.backbone.schedule, context.normal(f"{self.name}/noise")
        first = context.levels(schedule.level(schedule.uniform_timesteps(1)[0])).like(noise)
        move = Ode(self.scale, substeps=self.num_steps)
        return move.move(context, first.sigma * noise, (first, now.like(noise)))


@dataclass(frozen=True, slots=True)
class StudentStart(Start):
    """A point of the student's own trajectory; the times law must be of the same place.

    Attributes:
        place: Which step of which grid.
    """

    place: Place

    @torch.no_grad()
    def sample(self, context: StepContext, now: Levels) -> Tensor:
        path, index = self.place.draw(context)
        return student_sample(context, self.place.grid, self.place.name, path, index)
