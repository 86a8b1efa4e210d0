"""SenseFlow: distribution matching with a critic held near the student, and segments guided."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.anchors import SegmentGuide
from fewstep.trainer.components.rollouts import DataRollout, Either, Rollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.taus import LogitNormal, TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, aligned, guided_teacher
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Senseflow(Method):
    """Ge et al. 2025: implicit distribution alignment and intra-segment guidance."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="senseflow",
        summary="dmd2 with the critic pulled to the student and teacher-guided segments",
        paper="SenseFlow, arXiv:2506.00523",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA",
        equation="grad of dmd2; critic <- 0.97 critic + 0.03 student; "
        "|student(t->s) - student(teacher(t->u); u->s)|^2",
        deviations="no discriminator on vision features; squared segment error relative to the "
        "step's length; critic is an adapter unless lora.critic is full",
    )
    match: MatchConfig = field(default_factory=lambda: MatchConfig(ida=0.97))
    data_share: float = 0.5
    """Share of updates whose student starts from noised pictures instead of its own rollout; 0
    needs no pictures."""
    segment_weight: float = 1.0
    """Of the intra-segment guidance; 0 leaves it out."""
    tau_mean: float = 0.0
    """Mean of the logit-normal density at which teacher and critic are compared."""
    tau_std: float = 1.0
    """Its deviation."""

    def __post_init__(self) -> None:
        within("data-share", self.data_share, 0.0, 1.0)
        at_least("segment-weight", self.segment_weight, 0.0)
        above("tau-std", self.tau_std, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, rollout = self.match, self._rollout(frame)
        density = LogitNormal(self.tau_mean, self.tau_std)
        matching = ScoreDifference(
            rollout,
            guided_teacher(frame),
            tau=TauLaw(density=density, low=match.tau_min, high=match.tau_max),
            normaliser=match.normaliser,
        )
        terms = (Weighted(matching),)
        if self.segment_weight:
            guide = SegmentGuide(rollout, frame.guidance_scale)
            terms = (*terms, Weighted(guide, self.segment_weight))
        return (
            Stage(
                name="guided matching",
                num_steps=match.num_steps,
                terms=terms,
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(rollout),
                actions=aligned(match),
                uses_data=rollout.needs_data,
            ),
        )

    def _rollout(self, frame: Frame) -> Rollout:
        own = self.match.rollout(frame)
        if not self.data_share:
            return own
        return Either(DataRollout(frame.grid, own.exit), own, self.data_share)
