"""SIM: score implicit matching with a pseudo-Huber distance."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.grids import LAST_EXIT
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.score_identity import (
    NoNormaliser,
    PseudoHuberDistance,
    ScoreIdentity,
)
from fewstep.trainer.components.targets import ConstantGuidance
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above
from fewstep.trainer.methods.identity import IdentityConfig, Laws
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Sim(Method):
    """Luo et al. 2024."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="sim",
        summary="score implicit matching: a pseudo-Huber distance of scores, one step",
        paper="SIM, arXiv:2410.16794",
        needs="prompts",
        num_steps=1,
        artefact="LoRA",
        equation="(T - F) / sqrt(mean (T - F)^2 + c^2) . (F - x0), gradient through T and F",
        deviations="the student starts at the grid's first level; the distance counts the mean "
        "square over a sample, not the sum; adapters instead of full networks",
    )
    match: IdentityConfig = field(default_factory=IdentityConfig)
    c: float = 0.01
    """Score differences (in x0) below it count squared, above it alike."""

    def __post_init__(self) -> None:
        above("c", self.c, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        rollout = StudentRollout(frame.grid, LAST_EXIT)
        laws = Laws(ConstantGuidance(frame.guidance_scale))
        term = ScoreIdentity(
            rollout,
            alpha=1.0,
            distance=PseudoHuberDistance(self.c),
            teacher_law=laws.teacher,
            tau=self.match.tau,
            normaliser=NoNormaliser(),
        )
        stage = Stage(
            name="score implicit matching",
            num_steps=self.match.num_steps,
            terms=(Weighted(term),),
            learning_rate=self.match.learning_rate,
            betas=self.match.betas,
            critic=self.match.critic(rollout, laws),
        )
        return (stage,)
