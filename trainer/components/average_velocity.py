"""MeanFlow: a two-time network learns the teacher's average velocity by its own derivative.

    (tau_t - tau_s) u(z, t, s) = integral of v from s to t along the teacher's path, hence
    u = v - (tau_t - tau_s) du/dt,   du/dt along that path

in the flow view of any schedule (`flow_view`). v is the guided teacher's velocity, du/dt that of
the student itself, without gradient.

Source:
    Geng et al. 2025 (MeanFlow), arXiv:2505.13447, eqs. 6-11; finite differences as in AnyFlow.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.trainer.components.distances import AdaptiveL2, Distance
from fewstep.trainer.components.flow_view import (
    flow_state,
    flow_time,
    jump,
    jump_levels,
    level_rates,
    velocity_of,
)
from fewstep.trainer.components.jump_starts import Start
from fewstep.trainer.components.jump_times import JumpTimes, TimesLaw
from fewstep.trainer.components.moves import FixedScale, ScaleLaw, guided_answer, trained
from fewstep.trainer.components.moves import two_time_x0 as x0_towards
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels, positions_of
from fewstep.trainer.roles import Role


class Derivative(ABC):
    """Interface: the total derivative of the student's average velocity along the teacher."""

    @abstractmethod
    def of(
        self,
        context: StepContext,
        sample: Tensor,
        times: JumpTimes,
        teacher: Tensor,
        answer: Tensor,
    ) -> Tensor:
        """du/dtau, shape (B, ...), no gradient.

        Args:
            context: The update.
            sample: x_t.
            times: t and s; u is not looked at.
            teacher: The teacher's x0 at x_t.
            answer: The student's u there.
        """


@dataclass(frozen=True, slots=True)
class FiniteDifference(Derivative):
    """The student asked once more, a teacher step of `delta` below t.

    Attributes:
        delta: Share of the clock; never beyond s.
    """

    delta: float = 0.005

    @torch.no_grad()
    def of(
        self,
        context: StepContext,
        sample: Tensor,
        times: JumpTimes,
        teacher: Tensor,
        answer: Tensor,
    ) -> Tensor:
        now, end, schedule = times.start, times.end, context.backbone.schedule
        low = positions_of(schedule, end)
        positions = torch.maximum(positions_of(schedule, now) - self.delta, low)
        below = jump_levels(schedule, positions).like(sample)
        moved = jump(sample, teacher, now, below)
        gap = flow_time(now) - flow_time(below)
        is_apart = (gap > 0.0) & (below.sigma > 0.0)
        asked = _where(is_apart, below, now)  # at clean data there is no velocity to ask for
        there = torch.where(is_apart, moved, sample)
        x0 = x0_towards(context, trained(context), there, asked, end)
        slope = (answer - velocity_of(x0, there, asked)) / gap.clamp(min=1e-6)
        return torch.where(is_apart, slope, 0.0)


@dataclass(frozen=True, slots=True)
class ForwardMode(Derivative):
    """Exact, by a Jacobian-vector product through the network."""

    @torch.no_grad()
    def of(
        self,
        context: StepContext,
        sample: Tensor,
        times: JumpTimes,
        teacher: Tensor,
        answer: Tensor,
    ) -> Tensor:
        now = times.start
        rates = level_rates(context.backbone.schedule, now)
        scale, growth = now.alpha + now.sigma, rates.alpha + rates.sigma
        velocity = velocity_of(teacher, sample, now)
        moving = scale * velocity + growth * flow_state(sample, now)  # dx/dtau of x = scale z

        def average(x: Tensor, timestep: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            levels = Levels(timestep, alpha, sigma)
            x0 = x0_towards(context, trained(context), x, levels, times.end)
            return velocity_of(x0, x, levels)

        primals = (sample, now.timestep, now.alpha, now.sigma)
        tangents = (moving, rates.timestep, rates.alpha, rates.sigma)
        # fused attention has no forward mode; torch's first use of its own warns of its own code
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.func.jvp(average, primals, tangents)[1]


@dataclass(frozen=True, slots=True)
class AverageVelocity(Term):
    """The Eulerian identity of a two-time student.

    Attributes:
        start: Where x_t comes from.
        times: t and s.
        scale: The teacher's guidance.
        derivative: How du/dt is found.
        distance: Of the error.
        name: In the logs.
    """

    start: Start
    times: TimesLaw
    scale: ScaleLaw = FixedScale()
    derivative: Derivative = FiniteDifference()
    distance: Distance = AdaptiveL2()
    name: str = "average_velocity"

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.start.needs_data

    def loss(self, context: StepContext) -> TermLoss:
        times = self.times.draw(context)
        sample = self.start.sample(context, times.start)
        times = times.like(sample)
        now, end = times.start, times.end
        x0 = x0_towards(context, trained(context), sample, now, end)
        answer = velocity_of(x0, sample, now)
        with torch.no_grad():
            scale = self.scale.draw(context)
            teacher = guided_answer(context, Role.TEACHER, sample, now, scale)
            slope = self.derivative.of(context, sample, times, teacher, answer.detach())
            length = flow_time(now) - flow_time(end)
            target = velocity_of(teacher, sample, now) - length * slope
            square = (answer - target).square().mean()
        loss = self.distance.of(answer - target).mean()
        return loss, {f"loss/{self.name}": float(square)}


def _where(condition: Tensor, one: Levels, other: Levels) -> Levels:
    """Levels chosen sample by sample; `condition` has the shape of their sigma."""
    return Levels(
        torch.where(condition.reshape(-1), one.timestep, other.timestep),
        torch.where(condition, one.alpha, other.alpha),
        torch.where(condition, one.sigma, other.sigma),
    )
