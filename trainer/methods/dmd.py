"""DMD: one step, by distribution matching and by regression on teacher pairs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fewstep.errors import ConfigError
from fewstep.trainer.components.grids import even_path
from fewstep.trainer.components.pairs import PairRegression, TeacherPairs
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Noise and the picture the guided teacher draws from it, made once before training."""

    count: int = 256
    """How many, on prompts spread over the book; the paper has 10^5 to 10^6."""
    teacher_steps: int = 16
    """Steps of the teacher's ODE."""
    weight: float = 0.25
    """Of the regression."""

    def __post_init__(self) -> None:
        at_least("count", self.count, 1)
        at_least("teacher-steps", self.teacher_steps, 1)
        at_least("weight", self.weight, 0.0)


@dataclass(frozen=True, kw_only=True)
class Dmd(Method):
    """Yin et al. 2023: the first distribution matching distillation."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="dmd",
        summary="one step: distribution matching with as many critic steps, and teacher pairs",
        paper="DMD, arXiv:2311.18828",
        needs="prompts",
        num_steps=1,
        artefact="LoRA",
        equation="grad = (critic - teacher_w) / mean|x0 - teacher_w|, "
        "and 0.25 |student(z) - teacher ODE(z)|^2 on pairs made before training",
        deviations="squared error of latents instead of LPIPS; some hundred pairs instead of 10^5; "
        "critic is an adapter unless lora.critic is full; lower bound on the normaliser as in CDM",
    )
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(
            learning_rate=3e-4, critic_learning_rate=8e-4, critic_updates=1
        )
    )
    pairs: PairsConfig = field(default_factory=PairsConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, rollout = self.match, self.match.rollout(frame)
        path = even_path(frame.schedule, self.pairs.teacher_steps, shift=frame.config.grid.shift)
        pairs = TeacherPairs(self.pairs.count, path, frame.guidance_scale)
        matching = ScoreDifference(
            rollout, guided_teacher(frame), tau=match.tau, normaliser=match.normaliser
        )
        regression = PairRegression(pairs, frame.path)
        return (
            Stage(
                name="distribution matching with pairs",
                num_steps=match.num_steps,
                terms=(Weighted(matching), Weighted(regression, self.pairs.weight)),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(rollout),
                preparations=(pairs,),
            ),
        )

    def check(self, config: "TrainConfig") -> None:
        if config.grid.all_steps != (1,):
            counts = ", ".join(str(count) for count in config.grid.all_steps)
            raise ConfigError(
                f"dmd makes students of one step, got grid steps {counts}; set grid.num-steps to 1 "
                "and leave grid.also-steps out, or choose dmd2"
            )
