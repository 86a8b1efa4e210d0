"""DMDR: distribution matching that starts gently, and a reward once the student stands."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.trainer.components.grids import AnnealedExit
from fewstep.trainer.components.preferences import PsoTerm
from fewstep.trainer.components.rewards import RewardTerm, reward_named
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import Annealed, ConstantGuidance
from fewstep.trainer.components.taus import BetaAnnealed, TauLaw
from fewstep.trainer.components.terms import Term, Weighted
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.players import student_policy
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.parameters.policies import ParameterPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Action, Copy, Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

REFERENCE = Role("reference")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is rewarded, when and how much."""

    reward: str = "digits"
    """digits (the classifier's logit of the digit asked for), or a .pt2 program of torch.export
    that scores pictures."""
    weight: float = 0.01
    """Of the reward against distribution matching, which keeps it honest."""
    cold_start: float = 0.4
    """Share of the stage before the reward counts."""
    ramp: float = 0.1
    """Share of the stage over which its weight then rises."""
    share: float = 0.25
    """gradient: part of the samples that is decoded and scored."""
    climb: Literal["gradient", "pairs"] = "gradient"
    """gradient: through the decoder (ReFL). pairs: the better of two samples is made more likely
    (PSO); needs grid.stochasticity above 0 and two steps or more."""
    pair_beta: float = 10.0
    """pairs: sharpness."""
    pair_clip: float = 0.1
    """pairs: likelihood ratios beyond 1 plus or minus this teach nothing more."""

    def __post_init__(self) -> None:
        at_least("reward.weight", self.weight, 0.0)
        within("reward.cold-start", self.cold_start, 0.0, 1.0)
        within("reward.ramp", self.ramp, 0.0, 1.0)
        within("reward.share", self.share, 0.001, 1.0)
        above("reward.pair-beta", self.pair_beta, 0.0)
        within("reward.pair-clip", self.pair_clip, 1e-6, 0.99)


@dataclass(frozen=True, kw_only=True)
class Dmdr(Method):
    """Jiang et al. 2025: dynamic guidance, dynamic re-noising, and a reward beside them."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="dmdr",
        summary="a target that starts near the critic, high noise first, then a reward too",
        paper="DMDR, arXiv:2511.13649",
        needs="prompts and a reward",
        num_steps=4,
        artefact="LoRA",
        equation="grad of dmd2 with target = base + lambda critic's LoRA, lambda cos-> 0, tau and "
        "exit ~ Beta -> uniform; - w reward(decode(x0)) after a cold start",
        deviations="one stage with delayed reward instead of two; reward by gradient (ReFL) or "
        "PSO pairs, no GRPO",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    strength: float = 0.5
    """lambda at the start: 1 is the critic itself, 0 the teacher from the first step on."""
    until: float = 0.3
    """Share of the stage after which the target is the teacher."""
    beta_a: float = 3.0
    """Noise levels and exit steps start as Beta(1 + a, 1), high noise first, and end uniform; 0 is
    uniform throughout."""

    def __post_init__(self) -> None:
        within("strength", self.strength, 0.0, 1.0)
        within("until", self.until, 0.01, 1.0)
        at_least("beta-a", self.beta_a, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match = self.match
        rollout = StudentRollout(frame.grid, AnnealedExit(self.beta_a))
        tau = TauLaw(density=BetaAnnealed(self.beta_a), low=match.tau_min, high=match.tau_max)
        law = ConstantGuidance(frame.guidance_scale)
        matching = ScoreDifference(
            rollout,
            Annealed(law, strength=self.strength, until=self.until),
            tau=tau,
            normaliser=match.normaliser,
        )
        terms = (Weighted(matching),)
        if self.reward.weight:
            terms = (*terms, self._rewarded(frame, rollout))
        stage = Stage(
            name="rewarded matching",
            num_steps=match.num_steps,
            terms=terms,
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=dataclasses.replace(match.critic(rollout), tau=tau),
            actions=self._actions(),
        )
        return (stage,)

    def roles(self, frame: Frame) -> tuple[tuple[Role, ParameterPolicy], ...]:
        return ((REFERENCE, student_policy(frame)),) if self._has_pairs else ()

    def check(self, config: "TrainConfig") -> None:
        if self._has_pairs and (config.grid.stochasticity == 0.0 or config.grid.all_steps[0] < 2):
            raise ConfigError(
                f"reward.climb pairs needs steps that draw noise, but grid.stochasticity is "
                f"{config.grid.stochasticity:g} and the shortest grid has "
                f"{config.grid.all_steps[0]} step(s); set grid.stochasticity 1 and two steps or "
                "more, or climb the gradient"
            )

    @property
    def _has_pairs(self) -> bool:
        return self.reward.climb == "pairs" and self.reward.weight > 0.0

    def _rewarded(self, frame: Frame, rollout: StudentRollout) -> Weighted:
        config = self.reward
        reward = reward_named(config.reward)
        if config.climb == "gradient":
            term: Term = RewardTerm(rollout, reward, config.share)
        else:
            term = PsoTerm(
                frame.grid, reward, REFERENCE, beta=config.pair_beta, clip=config.pair_clip
            )
        return Weighted(term, config.weight, delay=config.cold_start, ramp=config.ramp)

    def _actions(self) -> tuple[Action, ...]:
        """The reference is the student at the end of its cold start."""
        if not self._has_pairs:
            return ()
        return (Copy(REFERENCE, Role.STUDENT, at=self.reward.cold_start),)
