"""SFD: the student's own steps follow the teacher's trajectory."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fewstep.trainer.components.distances import L1
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.teacher_path import TeacherPath
from fewstep.trainer.components.terms import Term, Weighted
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
    exits: Literal["random", "all"] = "random"
    """random: one step per update, towards where the teacher goes from the student's own sample;
    all: every step of the grid, towards the teacher's path from the same noise, as published."""
    distance: Literal["relative-l2", "l1"] = "relative-l2"
    """relative-l2: squared, over the step's squared length; l1: as published."""

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
        deviations="by default one random step per update and a squared distance relative to the "
        "step's length (exits all, distance l1 are the paper's); no analytical first step",
    )
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return (trajectory_stage(frame, self.trajectory),)


def trajectory_stage(frame: Frame, config: TrajectoryConfig, *, share: float = 1.0) -> Stage:
    """Trajectory matching on the run's grids; a warm start for other methods."""
    distance = L1() if config.distance == "l1" else None
    count, scale = config.teacher_substeps, frame.guidance_scale
    term: Term = TeacherEnd(StudentRollout(frame.grid), count, scale, distance)
    if config.exits == "all":
        term = TeacherPath(frame.grid, count, scale, distance)
    return Stage(
        name="trajectory",
        num_steps=config.num_steps,
        share=share,
        terms=(Weighted(term),),
        learning_rate=config.learning_rate,
    )
