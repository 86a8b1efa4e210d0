"""SiD: score identity distillation, in one step and in a few."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.errors import ConfigError
from fewstep.trainer.components.grids import ANY_EXIT, LAST_EXIT, Exit
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.score_identity import ScoreIdentity
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import within
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.identity import Guidance, IdentityConfig, laws_of
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Sid(Method):
    """Zhou et al. 2024: one step, no data."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="sid",
        summary="score identity distillation, one step, gradient through teacher and critic",
        paper="SiD, arXiv:2404.04057",
        needs="prompts",
        num_steps=1,
        artefact="LoRA",
        equation="(T - F) . [(T - x0) - alpha (T - F)] / mean|x0 - T|, gradient through T and F",
        deviations="the student starts at the grid's first level, not at sigma 2.5; adapters "
        "instead of full networks; lower bound on the normaliser",
    )
    match: IdentityConfig = field(default_factory=IdentityConfig)
    alpha: float = 1.2
    """1/2 is UID and FGM, 1 is SIM with the squared distance; above 1 is SiD."""
    guidance: Guidance = "lsg"
    """Where guidance enters: teacher; lsg (teacher and critic); zero-cfg (neither, and a critic
    without prompts); anti-cfg (a critic guided away from its prompt)."""
    anti_scale: float = -1.0
    """anti-cfg: the critic's guidance scale, below 0."""

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0.0, 2.0)
        check_anti(self.anti_scale)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return (identity_stage(frame, self, LAST_EXIT),)


@dataclass(frozen=True, kw_only=True)
class SidFewStep(Method):
    """Zhou et al. 2025: the uniform mixture of the outputs of all steps is matched."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="sid-few-step",
        summary="score identity distillation of all steps' outputs at once, three guidance laws",
        paper="few-step SiD, arXiv:2505.12674",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="SiD's loss at a uniformly drawn exit of the student's rollout",
        deviations="no Diffusion-GAN (it needs real pictures); anti-cfg's critic is trained with "
        "and without prompts; adapters instead of full networks",
    )
    match: IdentityConfig = field(default_factory=IdentityConfig)
    alpha: float = 1.0
    """1/2 is UID and FGM, 1 is SIM with the squared distance; above 1 is SiD."""
    guidance: Guidance = "lsg"
    """Where guidance enters: teacher; lsg (teacher and critic); zero-cfg (neither, and a critic
    without prompts); anti-cfg (a critic guided away from its prompt)."""
    anti_scale: float = -1.0
    """anti-cfg: the critic's guidance scale, below 0."""

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0.0, 2.0)
        check_anti(self.anti_scale)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        return (identity_stage(frame, self, ANY_EXIT),)

    def grid(self, grid: GridConfig) -> GridConfig:
        return dataclasses.replace(grid, stochasticity=1.0)


def check_anti(scale: float) -> None:
    """Refuse a scale that does not guide away from the prompt."""
    if scale >= 0.0:
        raise ConfigError(f"anti-scale must be below 0, got {scale:g}")


def identity_stage(frame: Frame, method: Sid | SidFewStep, exit: Exit) -> Stage:
    """SiD on a rollout with that exit."""
    match = method.match
    laws = laws_of(method.guidance, frame.guidance_scale, method.anti_scale)
    rollout = StudentRollout(frame.grid, exit)
    term = ScoreIdentity(
        rollout,
        method.alpha,
        teacher_law=laws.teacher,
        critic_law=laws.critic,
        tau=match.tau,
        normaliser=match.normaliser,
    )
    return Stage(
        name="score identity",
        num_steps=match.num_steps,
        terms=(Weighted(term),),
        learning_rate=match.learning_rate,
        betas=match.betas,
        critic=match.critic(rollout, laws),
    )
