"""Targets the teacher makes on a part of one student step: DP-DMD's anchor, SenseFlow's ISG."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level
from fewstep.trainer import losses
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.components.rollouts import Rolled, Rollout
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.components.trajectory import substeps, teacher_walk
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import level_at


@dataclass(frozen=True, slots=True)
class FirstStepAnchor(Term):
    """The first step heads for where the teacher is after k of its K steps from the same noise.

        mean (v_student - (x_1 - x_anchor) / (sigma_1 - sigma_anchor))^2        for flow

    For any schedule: x0* is the prediction whose deterministic step arrives at the anchor, and the
    error is (x0_student - x0*) / sigma_1, which is the velocity's.

    Attributes:
        rollout: Ends at the first step.
        path: The teacher's grid of K steps.
        anchor: k.
        guidance_scale: The teacher's w.

    Source:
        DP-DMD, arXiv:2602.03139.
    """

    rollout: Rollout
    path: StudentPath
    anchor: int
    guidance_scale: float

    def loss(self, context: StepContext) -> TermLoss:
        rolled = context.rolled(self.rollout)
        stops = [rolled.now, *self.path.levels[1 : self.anchor + 1]]
        reached = teacher_walk(context, rolled.sample, stops, self.guidance_scale)
        x0 = x0_towards(rolled.sample, reached, rolled.now, stops[-1])
        loss = ((rolled.x0 - x0) / rolled.now.sigma).square().mean()
        return loss, {"loss/anchor": loss.item()}


@dataclass(frozen=True, slots=True)
class SegmentGuide(Term):
    """One student step must arrive where the teacher and then the student do from within it.

    With a level u drawn between the step's ends t and s:

        | student(t -> s) - stopgrad(student(teacher(t -> u); u -> s)) |^2 / |length|^2

    Attributes:
        rollout: Where the student starts.
        guidance_scale: The teacher's w.
        teacher_steps: Steps the teacher takes from t to u.

    Source:
        SenseFlow, arXiv:2506.00523 (intra-segment guidance, one teacher step); the division by the
        step's length is ours, it makes all steps count alike.
    """

    rollout: Rollout
    guidance_scale: float
    teacher_steps: int = 1

    def loss(self, context: StepContext) -> TermLoss:
        rolled = context.rolled(self.rollout)
        now, following = rolled.now, rolled.following
        between = self._between(context, rolled)
        stops = substeps(rolled.path, now, between, self.teacher_steps)
        sample = teacher_walk(context, rolled.sample, stops, self.guidance_scale)
        with torch.no_grad():
            x0 = context.student_x0(sample, between, following)
            target = sampling.step(sample, x0, between, following, None, following)
        reached = sampling.step(rolled.sample, rolled.x0, now, following, None, following)
        loss = losses.trajectory_loss(reached, target, rolled.sample)
        return loss, {"loss/segment": loss.item()}

    def _between(self, context: StepContext, rolled: Rolled) -> Level:
        u = float(torch.rand((), generator=context.draws.shared("segment")))
        low, high = rolled.end_position, rolled.position
        return level_at(rolled.path.schedule, low + (high - low) * u)


def x0_towards(sample: Tensor, reached: Tensor, now: Level, there: Level) -> Tensor:
    """The x0 whose deterministic step from `sample` at `now` arrives at `reached` at `there`."""
    ratio = there.sigma / now.sigma
    return (reached - ratio * sample) / (there.alpha - now.alpha * ratio)
