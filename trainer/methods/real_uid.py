"""RealUID: inverse distillation with real data in the critic, and no discriminator."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.errors import ConfigError
from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.grids import LAST_EXIT
from fewstep.trainer.components.real_uid import RealShares, RealUid, RealUidCritic
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.targets import ConstantGuidance
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.stages import Stage


@dataclass(frozen=True, kw_only=True)
class RealUidMethod(Method):
    """Kornilov et al. 2025."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="realuid",
        summary="inverse distillation whose critic mixes the student's targets with real data's",
        paper="RealUID, arXiv:2509.22459",
        needs="prompts and pictures",
        num_steps=1,
        artefact="LoRA",
        equation="alpha (|T - beta/alpha u|^2 - |F - beta/alpha u|^2), gradient through T, F and u",
        deviations="the teacher may be guided; no GAN finetuning; adapters, not full networks",
    )
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(
            learning_rate=3e-4, critic_learning_rate=1e-3, tau_shift=4.0
        )
    )
    alpha: float = 0.92
    """Share of the student's samples in the critic's objective; 1 with beta 1 uses no data."""
    beta: float = 0.94
    """Share of the student's targets; the authors keep beta / alpha at 0.98 or 1.02."""

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0.01, 1.0)
        within("beta", self.beta, 0.01, 1.0)
        if self.alpha == 1.0 != self.beta:
            raise ConfigError(
                f"alpha 1 leaves no data for beta {self.beta:g} to speak of; set beta to 1 too"
            )

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, shares = self.match, RealShares(self.alpha, self.beta)
        rollout = StudentRollout(frame.grid, LAST_EXIT)
        law = ConstantGuidance(frame.guidance_scale)
        learnt = RealUidCritic(rollout, shares, match.tau)
        stage = Stage(
            name="inverse distillation",
            num_steps=match.num_steps,
            terms=(Weighted(RealUid(rollout, shares, law, match.tau)),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=Critic(
                rollout=rollout,
                learning_rate=match.critic_learning_rate,
                updates=match.critic_updates,
                warmup=match.critic_warmup,
                keep=match.ida,
                extras=(learnt,),
                trains=False,
            ),
            uses_data=learnt.needs_data,
        )
        return (stage,)
