"""Settings that consistency and flow-map methods share, and the pieces they become."""

from dataclasses import dataclass
from typing import Literal

from fewstep.trainer.components.jump_starts import DataStart, Start, TeacherStart
from fewstep.trainer.components.moves import FixedScale, ScaleLaw, UniformScale
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role


@dataclass(frozen=True, kw_only=True)
class JumpConfig:
    """Jumps along the teacher's trajectories: rates, and where they start."""

    num_steps: int = 400
    """Optimizer steps (of each stage)."""
    learning_rate: float = 1e-3
    """Peak, after a short warm-up; falls to a tenth along a cosine."""
    source: Literal["data", "teacher"] = "data"
    """Where jumps start: noised real pictures, or points of the teacher's own trajectories, which
    needs prompts only."""
    source_steps: int = 8
    """source teacher: its steps from noise to the point."""
    scale_spread: float = 0.0
    """The teacher's guidance scale is drawn this far around the run's, per sample (LCM: a range);
    0 takes the run's."""

    def __post_init__(self) -> None:
        at_least("num-steps", self.num_steps, 1)
        above("learning-rate", self.learning_rate, 0.0)
        at_least("source-steps", self.source_steps, 1)
        within("scale-spread", self.scale_spread, 0.0, 20.0)

    @property
    def uses_data(self) -> bool:
        """Whether stages draw real latents."""
        return self.source == "data"

    def scale(self, frame: Frame) -> ScaleLaw:
        """The teacher's guidance."""
        w = frame.guidance_scale
        if self.scale_spread == 0.0:
            return FixedScale(w)
        return UniformScale(w - self.scale_spread, w + self.scale_spread)

    def start(self, frame: Frame) -> Start:
        """Where jumps start."""
        if self.uses_data:
            return DataStart()
        return TeacherStart(self.source_steps, FixedScale(frame.guidance_scale))


TARGETS = {"student": Role.STUDENT, "average": Role.AVERAGE}
"""Who makes the target of a consistency method: the student as it is, or its average."""
