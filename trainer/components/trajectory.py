"""The teacher's own path as a target: several guided steps inside one step of the student."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level
from fewstep.trainer import losses
from fewstep.trainer.components.distances import Distance
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.roles import Role


@dataclass(frozen=True, slots=True)
class TeacherEnd(Term):
    """The student's single step must arrive where several guided teacher steps do.

    Attributes:
        rollout: Where the student starts: its own trajectory (SFD).
        substeps: Teacher steps inside one student step.
        guidance_scale: The teacher's w.
        distance: Of the two ends; None takes the squared distance over the squared length of the
            step, so that all steps count alike.

    Source:
        Zhou et al. 2024 (SFD), arXiv:2409.19681; one random step per update, from the student's own
        sample to where the teacher goes from there. `teacher_path` has all steps at once.
    """

    rollout: Rollout
    substeps: int
    guidance_scale: float
    distance: Distance | None = None

    def loss(self, context: StepContext) -> TermLoss:
        rolled = context.rolled(self.rollout)
        now, following = rolled.now, rolled.following
        reached = sampling.step(rolled.sample, rolled.x0, now, following, None, following)
        stops = substeps(rolled.path, now, following, self.substeps)
        target = teacher_walk(context, rolled.sample, stops, self.guidance_scale)
        if self.distance is None:
            loss = losses.trajectory_loss(reached, target, rolled.sample)
        else:
            loss = self.distance.of(reached - target).mean()
        return loss, {"loss/trajectory": loss.item()}


@torch.no_grad()
def teacher_walk(
    context: StepContext, sample: Tensor, stops: list[Level], guidance_scale: float
) -> Tensor:
    """The guided teacher's deterministic steps through `stops`, starting from `sample`."""
    for here, there in zip(stops, stops[1:], strict=False):
        x0 = context.backbone.guided_x0(
            Role.TEACHER,
            sample,
            context.levels(here),
            context.condition,
            context.null_condition,
            guidance_scale,
        )
        sample = sampling.step(sample, x0, here, there, None, there)
    return sample


def substeps(path: StudentPath, now: Level, following: Level, count: int) -> list[Level]:
    """`count` + 1 levels from `now` to `following`, evenly spaced on the schedule's clock."""
    width = (now.timestep - following.timestep) / count
    inner = [path.schedule.level(now.timestep - i * width) for i in range(1, count)]
    return [now, *inner, following]
