"""The jump term: one regression that consistency models, flow maps and progressive rounds share.

    loss = distance(X(x_t; t -> s), bootstrap(transport(x_t; t -> u); u -> s))

X is the student's jump; x_t comes from a start law, t, u and s from a times law; transport and
bootstrap are moves without gradient.

    consistency   transport: a teacher step, bootstrap: the student's (or its average's) jump
    progressive   transport: two teacher steps, u = s
    trajectory    transport: many teacher steps, u = s
    semigroup     transport and bootstrap: the student's own jumps
    Lagrangian    transport: the student's own jump, bootstrap: a teacher step, u just above s

The limit u -> t with two-time networks (MeanFlow) is `average_velocity`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.trainer.components.distances import L2, Distance
from fewstep.trainer.components.flow_view import flow_time
from fewstep.trainer.components.jump_starts import Start
from fewstep.trainer.components.jump_times import JumpTimes, TimesLaw
from fewstep.trainer.components.moves import Move, own_jump, trained
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext


class Space(ABC):
    """Interface: in which quantity the error of a jump is measured."""

    @abstractmethod
    def factor(self, times: JumpTimes) -> Tensor:
        """What the error at the jump's end is multiplied by, shape (B, 1, ...)."""


@dataclass(frozen=True, slots=True)
class EndSpace(Space):
    """The samples at the jump's end themselves."""

    def factor(self, times: JumpTimes) -> Tensor:
        return torch.ones_like(times.end.sigma)


@dataclass(frozen=True, slots=True)
class X0Space(Space):
    """The clean data that the jump goes towards."""

    def factor(self, times: JumpTimes) -> Tensor:
        ratio = times.end.sigma / times.start.sigma
        return 1.0 / (times.end.alpha - times.start.alpha * ratio).clamp(min=1e-4)


@dataclass(frozen=True, slots=True)
class VelocitySpace(Space):
    """The average velocity on the way, so that short and long jumps count alike.

    For flow the velocity itself; for VP about progressive distillation's SNR + 1 weight.
    """

    def factor(self, times: JumpTimes) -> Tensor:
        length = flow_time(times.start) - flow_time(times.end)
        return 1.0 / ((times.end.alpha + times.end.sigma) * length.clamp(min=1e-4))


@dataclass(frozen=True, slots=True)
class JumpTerm(Term):
    """The student's jump against its target.

    Attributes:
        start: Where x_t comes from.
        times: t, u and s.
        transport: From t to u.
        bootstrap: From u to s; None where u = s.
        distance: Of the error.
        space: What the error is measured in.
        name: In the logs.
    """

    start: Start
    times: TimesLaw
    transport: Move
    bootstrap: Move | None = None
    distance: Distance = L2()
    space: Space = EndSpace()
    name: str = "jump"

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.start.needs_data

    def loss(self, context: StepContext) -> TermLoss:
        times = self.times.draw(context)
        sample = self.start.sample(context, times.start)
        times = times.like(sample)
        reached = own_jump(context, trained(context), sample, times.start, times.end)
        with torch.no_grad():
            target = self.transport.move(context, sample, times.stops)
            if self.bootstrap is not None:
                target = self.bootstrap.move(context, target, (times.middle, times.end))
            factor = self.space.factor(times)
        loss = self.distance.of(factor * (reached - target)).mean()
        return loss, {f"loss/{self.name}": loss.item()}
