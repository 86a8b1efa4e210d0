"""SFD: the student's own steps follow the teacher's trajectory."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.components.trajectory import TeacherEnd
from fewstep.trainer.config_checks import above, at_least
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """The student's steps follow the teacher's trajectory (SFD)."""

    num_steps: int = 300
    """Optimizer steps; 0 skips the stage."""
    learning_rate: float = 1e-3
    """Peak, after a short warm-up; falls to a tenth along a cosine."""
    teacher_substeps: int = 4
    """Teacher steps inside one student step."""

    def __post_init__(self) -> None:
        at_least("num-steps", self.num_steps, 0)
        above("learning-rate", self.learning_rate, 0.0)
        at_least("teacher-substeps", self.teacher_substeps, 1)


@dataclass(frozen=True, kw_only=True)
class Sfd(Method):
    """Zhou et al. 2024: trajectory matching from the student's own samples."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="sfd",
        summary="each step of the student arrives where several teacher steps do",
        paper="SFD, arXiv:2409.19681",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="|student step - teacher ODE over the same span|^2 / |span|^2",
        deviations="one random step per update instead of all; squared distance relative to the "
        "step's length; no analytical first step",
    )
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return (trajectory_stage(frame, self.trajectory),)


def trajectory_stage(frame: Frame, config: TrajectoryConfig, *, share: float = 1.0) -> Stage:
    """Trajectory matching on the run's grids; a warm start for other methods."""
    term = TeacherEnd(StudentRollout(frame.grid), config.teacher_substeps, frame.guidance_scale)
    return Stage(
        name="trajectory",
        num_steps=config.num_steps,
        share=share,
        terms=(Weighted(term),),
        learning_rate=config.learning_rate,
    )
