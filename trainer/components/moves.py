"""How a target gets from one level to another: the teacher's ODE or SDE, or somebody's own jump.

No move carries a gradient.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.heads.two_time import target_time
from fewstep.trainer.components.flow_view import jump, jump_levels
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels, positions_of
from fewstep.trainer.roles import Role


class ScaleLaw(ABC):
    """Interface: the teacher's guidance scale in a move."""

    @abstractmethod
    def draw(self, context: StepContext) -> float | Tensor:
        """One for all, or one per sample, shape (B,)."""


@dataclass(frozen=True, slots=True)
class FixedScale(ScaleLaw):
    """Always w; 1 is no guidance."""

    w: float = 1.0

    def draw(self, context: StepContext) -> float:
        return self.w


@dataclass(frozen=True, slots=True)
class UniformScale(ScaleLaw):
    """Uniform between two scales, one per sample (LCM); the student learns their mean effect."""

    low: float
    high: float

    def draw(self, context: StepContext) -> Tensor:
        return self.low + (self.high - self.low) * context.draws.uniform("guidance-scale")


class Move(ABC):
    """Interface: a deterministic or random map from the first to the last of some levels."""

    @abstractmethod
    def move(self, context: StepContext, sample: Tensor, stops: tuple[Levels, ...]) -> Tensor:
        """The sample at the last stop.

        Args:
            context: The update.
            sample: At the first stop, shape (B, ...).
            stops: Levels shaped like the sample, noisiest first.
        """


@dataclass(frozen=True, slots=True)
class Ode(Move):
    """Deterministic steps of somebody's prediction, one per pair of stops.

    Attributes:
        scale: Guidance.
        role: Who predicts.
        substeps: Steps between two stops, evenly spaced on the clock.
    """

    scale: ScaleLaw = FixedScale()
    role: Role = Role.TEACHER
    substeps: int = 1

    @torch.no_grad()
    def move(self, context: StepContext, sample: Tensor, stops: tuple[Levels, ...]) -> Tensor:
        scale = self.scale.draw(context)
        for now, following in _legs(context, stops, self.substeps):
            x0 = guided_answer(context, self.role, sample, now, scale)
            sample = jump(sample, x0, now, following)
        return sample


@dataclass(frozen=True, slots=True)
class Sde(Move):
    """The same with fresh noise: each step goes too far down and is noised back up.

    Attributes:
        eta: 0 is the ODE, 1 goes to clean data each time.
        scale: Guidance.
        role: Who predicts.
        substeps: Steps between two stops.
        name: Of its draws.

    Source:
        SCott, arXiv:2403.01505, asks for little noise (eta well below 1).
    """

    eta: float
    scale: ScaleLaw = FixedScale()
    role: Role = Role.TEACHER
    substeps: int = 1
    name: str = "sde"

    @torch.no_grad()
    def move(self, context: StepContext, sample: Tensor, stops: tuple[Levels, ...]) -> Tensor:
        scale, schedule = self.scale.draw(context), context.backbone.schedule
        for index, (now, following) in enumerate(_legs(context, stops, self.substeps)):
            x0 = guided_answer(context, self.role, sample, now, scale)
            via = jump_levels(schedule, (1.0 - self.eta) * positions_of(schedule, following))
            via = via.like(sample)
            carry = following.alpha / via.alpha
            spread = (following.sigma.square() - (carry * via.sigma).square()).clamp(min=0.0).sqrt()
            noise = context.normal(f"{self.name}/{index}")
            sample = carry * jump(sample, x0, now, via) + spread * noise
        return sample


@dataclass(frozen=True, slots=True)
class Jumped(Move):
    """Somebody's own jump from the first stop to the last, without gradient.

    Attributes:
        role: The student itself, its average, or a copy.
    """

    role: Role = Role.STUDENT

    @torch.no_grad()
    def move(self, context: StepContext, sample: Tensor, stops: tuple[Levels, ...]) -> Tensor:
        role = trained(context) if self.role == Role.STUDENT else self.role
        return own_jump(context, role, sample, stops[0], stops[-1])


def trained(context: StepContext) -> Role:
    """The student of this update."""
    return Role.STUDENT if context.expert is None else Role.STUDENT.expert(context.expert)


def own_jump(
    context: StepContext, role: Role, sample: Tensor, now: Levels, following: Levels
) -> Tensor:
    """A role's jump: the deterministic step with its own prediction; it is told where it ends.

    At following = now it is the identity, whatever the network says.
    """
    x0 = two_time_x0(context, role, sample, now, following)
    return jump(sample, x0, now, following)


def two_time_x0(
    context: StepContext, role: Role, sample: Tensor, now: Levels, following: Levels
) -> Tensor:
    """A role's prediction on its way to a level; only roles with a two-time head listen."""
    with target_time(following.timestep, now.timestep):
        return context.backbone.x0(role, sample, now, context.condition)


def guided_answer(
    context: StepContext, role: Role, sample: Tensor, now: Levels, scale: float | Tensor
) -> Tensor:
    """x0 under guidance, with one scale or one per sample."""
    backbone, condition, null = context.backbone, context.condition, context.null_condition
    if isinstance(scale, float | int):
        return backbone.guided_x0(role, sample, now, condition, null, scale)
    cond, uncond = backbone.both_x0(role, sample, now, condition, null)
    column = scale.reshape(-1, *[1] * (sample.ndim - 1)).float()
    return backbone.combine(cond, uncond, column, sample.float())


def _legs(
    context: StepContext, stops: tuple[Levels, ...], count: int
) -> list[tuple[Levels, Levels]]:
    """Pairs of neighbouring levels, each leg cut into `count` parts."""
    schedule, all_stops = context.backbone.schedule, [stops[0]]
    for now, following in zip(stops, stops[1:], strict=False):
        high, low = positions_of(schedule, now), positions_of(schedule, following)
        for k in range(1, count):
            inner = jump_levels(schedule, high + (low - high) * k / count)
            all_stops.append(Levels(inner.timestep, inner.alpha, inner.sigma))
        all_stops.append(following)
    shape = stops[0].sigma.shape
    aligned = [
        Levels(s.timestep, s.alpha.reshape(shape), s.sigma.reshape(shape)) for s in all_stops
    ]
    return list(zip(aligned, aligned[1:], strict=False))
