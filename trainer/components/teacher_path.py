"""SFD as published: all steps of one trajectory at once, each towards the teacher's own path."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.trainer import losses
from fewstep.trainer.components.distances import L1, Distance
from fewstep.trainer.components.grids import GridLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.components.trajectory import substeps, teacher_walk
from fewstep.trainer.context import StepContext


@dataclass(frozen=True, slots=True)
class TeacherPath(Term):
    """From one noise, student and teacher walk the grid; every student step is compared.

    The student goes on from its own detached sample, but its target is the teacher's state of the
    same noise, so that later steps learn to correct earlier ones.

    Attributes:
        grid: The student's.
        substeps: Teacher steps inside one student step.
        guidance_scale: The teacher's w.
        distance: Of a step's end from the teacher's state; None takes the squared distance over
            the squared length of the step, so that all steps count alike.

    Source:
        Zhou et al. 2024 (SFD), arXiv:2409.19681: L1, an optimizer step after each step of the grid
        (here one for their mean).
    """

    grid: GridLaw
    substeps: int
    guidance_scale: float
    distance: Distance | None = L1()

    def loss(self, context: StepContext) -> TermLoss:
        path = self.grid.draw(context.draws, "path")
        sample = teacher = path.levels[0].sigma * context.normal("path/noise")
        found: list[Tensor] = []
        for now, following in zip(path.levels, path.levels[1:], strict=False):
            stops = substeps(path, now, following, self.substeps)
            teacher = teacher_walk(context, teacher, stops, self.guidance_scale)
            with torch.set_grad_enabled(context.with_grad):
                x0 = context.student_x0(sample, now, following)
                reached = sampling.step(sample, x0, now, following, None, following)
                found.append(self._off(reached, teacher, sample))
            sample = reached.detach()
        loss = torch.stack(found).mean()
        return loss, {"loss/trajectory": loss.item()}

    def _off(self, reached: Tensor, teacher: Tensor, sample: Tensor) -> Tensor:
        if self.distance is None:
            return losses.trajectory_loss(reached, teacher, sample)
        return self.distance.of(reached - teacher).mean()
