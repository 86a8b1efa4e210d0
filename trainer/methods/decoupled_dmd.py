"""Decoupled DMD: guidance as the engine and matching as the regulariser, each at its own noise."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fewstep.trainer.components.grids import even_path
from fewstep.trainer.components.moments import MomentGuard
from fewstep.trainer.components.pairs import TeacherPairs
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.signals import GuidanceAugmentation, ScoreDifference
from fewstep.trainer.components.targets import ConstantGuidance, Guided
from fewstep.trainer.components.taus import Above, Below, Full, Span, TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.stages import Stage

SPANS: dict[str, Span] = {"below": Below(), "above": Above(), "full": Full()}
GUARD_PAIRS, GUARD_STEPS = 128, 16


@dataclass(frozen=True, kw_only=True)
class DecoupledDmd(Method):
    """Liu et al. 2025: CFG augmentation and distribution matching."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="decoupled-dmd",
        summary="dmd2 with its guidance half asked at noise levels of its own",
        paper="Decoupled DMD, arXiv:2511.22677",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="grad = (critic - teacher_c)(tau_dm) / n_dm "
        "- (w - 1)(teacher_c - teacher_u)(tau_ca) / n_ca, tau_ca below the student's level",
        deviations="no GAN beside the matching; critic is an adapter unless lora.critic is full; "
        "moments: targets measured on the teacher instead of fixed numbers",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    guidance_span: Literal["below", "above", "full"] = "below"
    """Noise levels of the guidance half, against the student's own: cleaner (the paper's, whose
    time runs from noise to data), noisier, or any."""
    guidance_weight: float = 1.0
    """Factor of the guidance half."""
    regulariser: Literal["matching", "moments"] = "matching"
    """What keeps the guidance half in bounds: distribution matching, or only a mean and a variance
    of every picture (no critic; the paper's ablation)."""

    def __post_init__(self) -> None:
        above("guidance-weight", self.guidance_weight, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, rollout = self.match, self.match.rollout(frame)
        terms = (
            *augmentation(frame, match, rollout, SPANS[self.guidance_span], self.guidance_weight),
        )
        if self.regulariser == "moments":
            path = even_path(frame.schedule, GUARD_STEPS, shift=frame.config.grid.shift)
            pairs = TeacherPairs(GUARD_PAIRS, path, frame.guidance_scale)
            return (
                Stage(
                    name="guidance augmentation with moments",
                    num_steps=match.num_steps,
                    terms=(*terms, Weighted(MomentGuard(rollout, pairs))),
                    learning_rate=match.learning_rate,
                    betas=match.betas,
                    preparations=(pairs,),
                ),
            )
        return (
            Stage(
                name="decoupled matching",
                num_steps=match.num_steps,
                terms=(*terms, Weighted(unguided_matching(match, rollout))),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(rollout),
            ),
        )


def augmentation(
    frame: Frame, match: MatchConfig, rollout: Rollout, span: Span, weight: float = 1.0
) -> tuple[Weighted, ...]:
    """The guidance half; nothing where the run has no guidance."""
    if frame.guidance_scale == 1.0:
        return ()
    term = GuidanceAugmentation(
        rollout,
        ConstantGuidance(frame.guidance_scale),
        tau=TauLaw(span, match.tau.density, match.tau_min, match.tau_max),
        normaliser=match.normaliser,
    )
    return (Weighted(term, weight),)


def unguided_matching(match: MatchConfig, rollout: Rollout, name: str = "dm") -> ScoreDifference:
    """The matching half: the teacher without guidance, at any noise."""
    return ScoreDifference(rollout, Guided(), tau=match.tau, normaliser=match.normaliser, name=name)
