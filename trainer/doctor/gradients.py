"""Who learns from what: one update of student and critic, and where gradients arrive."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.trainer.doctor.cost import enter_stage
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run


@dataclass(frozen=True, slots=True)
class GradientRow:
    """One update of one learner.

    Attributes:
        learner: "student" or "critic".
        role: Whose parameters.
        moved: Share of its tensors that the update changed.
        expected: Whether this learner should change this role.
    """

    learner: str
    role: str
    moved: float
    expected: bool

    @property
    def is_right(self) -> bool:
        """Whether exactly the intended role learned."""
        return (self.moved > 0.0) == self.expected


def gradient_flow(run: Run, stage: int) -> list[GradientRow]:
    """Make the two updates of one step of a stage and see which roles they change.

    A fresh LoRA has zero ups, so its downs get no gradient in the first step: half of the tensors
    is what a right update moves. The average follows the student and is not a learner.
    """
    enter_stage(run, stage)
    rows: list[GradientRow] = []
    if run.stage.critic is not None:
        critics = {role.name for role in run.critic_roles()} if run.stage.critic.trains else set()
        rows += _moved(run, "critic", critics, lambda: run.update_critic(1))
    if run.stage.trains_student:
        students = {role.name for role in run.student_roles()}
        rows += _moved(run, "student", students, run.update_student)
    return rows


def _moved(run: Run, learner: str, expected: set[str], update: object) -> list[GradientRow]:
    cast = run.setting.cast
    names = [name for name in cast.policies if not name.startswith(Role.AVERAGE.name)]
    before = {name: _copies(cast.parameters(Role(name))) for name in names}
    assert callable(update)
    update()
    rows = []
    for name in names:
        pairs = list(zip(before[name], cast.parameters(Role(name)), strict=True))
        moved = sum(not torch.equal(a, b.detach()) for a, b in pairs) / max(1, len(pairs))
        rows.append(GradientRow(learner, name, moved, name in expected))
    return rows


def _copies(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
