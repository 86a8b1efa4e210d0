"""WaDi: score distillation of an adapter that only turns weights, never stretches them."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.critics import SignalWeight
from fewstep.trainer.components.grids import LAST_EXIT
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import EpsilonVariance, ScoreDifference
from fewstep.trainer.components.targets import ConstantGuidance, Guided
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import within
from fewstep.trainer.config_parts import LoraConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Wadi(Method):
    """Wang et al. 2026: VSD with LoRaD adapters on student and critic."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="wadi",
        summary="VSD with rotations of weight columns (LoRaD) in place of LoRA, one step",
        paper="WaDi, arXiv:2603.08258",
        needs="prompts",
        num_steps=1,
        artefact="LoRaD",
        equation="grad = sigma^2 (epsilon_teacher_w - epsilon_critic_w), theta = A B",
        deviations="one rank for student and critic (the paper: 256 and 32); each sample drops its "
        "prompt by itself, not the whole batch",
    )
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(
            learning_rate=5e-3, critic_learning_rate=1e-2, critic_updates=1
        )
    )
    null_share: float = 0.1
    """Part of the critic's samples trained without their prompt, as the critic is guided too."""

    def __post_init__(self) -> None:
        within("null-share", self.null_share, 0.0, 1.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match = self.match
        rollout = StudentRollout(frame.grid, LAST_EXIT)
        law = ConstantGuidance(frame.guidance_scale)
        term = ScoreDifference(
            rollout,
            Guided(law),
            critic=Guided(law, Role.CRITIC),
            tau=match.tau,
            normaliser=EpsilonVariance(),
        )
        critic = match.critic(rollout, null_share=self.null_share)
        stage = Stage(
            name="direction-aware matching",
            num_steps=match.num_steps,
            terms=(Weighted(term),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=dataclasses.replace(critic, weight=SignalWeight()),
        )
        return (stage,)

    def parameters(self, lora: LoraConfig) -> LoraConfig:
        return dataclasses.replace(lora, student="lorad", critic="lorad")
