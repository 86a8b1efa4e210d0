"""DMD2: distribution matching on the student's own rollouts, with a fast critic and no data."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Dmd2(Method):
    """Yin et al. 2024: TTUR and backward simulation."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="dmd2",
        summary="distribution matching on the student's own rollouts, fast critic, no data",
        paper="DMD2, arXiv:2405.14867",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="grad = (critic - teacher_w) / mean|x0 - teacher_w| at re-noised rollouts",
        deviations="no GAN (dmd2-gan has it); critic is an adapter unless lora.critic is full; "
        "lower bound on the normaliser as in CDM",
    )
    match: MatchConfig = field(default_factory=MatchConfig)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return (dmd2_stage(frame, self.match),)


def dmd2_stage(frame: Frame, match: MatchConfig, *, share: float = 1.0) -> Stage:
    """The plain stage other methods start from."""
    rollout = match.rollout(frame)
    term = ScoreDifference(
        rollout, guided_teacher(frame), tau=match.tau, normaliser=match.normaliser
    )
    return Stage(
        name="distribution matching",
        num_steps=match.num_steps,
        share=share,
        terms=(Weighted(term),),
        learning_rate=match.learning_rate,
        betas=match.betas,
        critic=match.critic(rollout),
    )
