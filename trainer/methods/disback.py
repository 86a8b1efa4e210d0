"""DisBack: the way from the teacher to the untrained student, recorded and then walked back."""

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import AlongPath, ConstantGuidance, Guided
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.players import critic_policy
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.parameters.policies import ParameterPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Copy, Stage


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Degradation recording: the critic learns the untrained student, and is kept on the way."""

    num_steps: int = 60
    """Steps of the critic, each of match.critic-updates updates."""
    num_stops: int = 4
    """Critics kept on the way; the teacher and the last critic are the ends."""
    share: float = 0.15
    """Part of a budget."""

    def __post_init__(self) -> None:
        at_least("record.num-stops", self.num_stops, 1)
        at_least("record.num-steps", self.num_steps, self.num_stops + 1)
        within("record.share", self.share, 0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class Disback(Method):
    """Zhang et al. 2024: degradation recording, then distribution backtracking."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="disback",
        summary="the critic's way to the untrained student is recorded and distilled backwards",
        paper="DisBack, arXiv:2408.15991",
        needs="prompts",
        num_steps=1,
        artefact="LoRA",
        equation="record D_1 .. D_n of the critic on the first student; grad of dmd2 with "
        "D_n, ..., D_1, then the teacher as its target",
        deviations="stops share a part of the stage evenly instead of a fixed count of steps; "
        "guidance grows from 1 to w along the way; DMD's normaliser",
    )
    record: RecordConfig = field(default_factory=RecordConfig)
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(
            learning_rate=1e-3, critic_learning_rate=2e-3, critic_warmup=0
        )
    )
    arrive: float = 0.4
    """Share of the second stage after which the teacher itself is the target."""

    def __post_init__(self) -> None:
        within("arrive", self.arrive, 0.01, 1.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        rollout = self.match.rollout(frame)
        return self._recording(rollout), self._backtracking(frame, rollout)

    def roles(self, frame: Frame) -> tuple[tuple[Role, ParameterPolicy], ...]:
        return tuple((stop, critic_policy(frame)) for stop in self._stops())

    def _stops(self) -> tuple[Role, ...]:
        """Where critics are kept, nearest to the teacher first."""
        return tuple(Role(f"path-{i + 1}") for i in range(self.record.num_stops))

    def _recording(self, rollout: Rollout) -> Stage:
        record, stops = self.record, self._stops()
        return Stage(
            name="degradation recording",
            num_steps=record.num_steps,
            share=record.share,
            betas=self.match.betas,
            critic=self.match.critic(rollout),
            actions=tuple(
                Copy(stop, Role.CRITIC, at=(i + 1) / (len(stops) + 1))
                for i, stop in enumerate(stops)
            ),
        )

    def _backtracking(self, frame: Frame, rollout: Rollout) -> Stage:
        match, stops = self.match, self._stops()
        ends = len(stops) + 1  # the critic itself, which is the student, is the other end
        way = tuple(
            Guided(self._law(frame, 1.0 - (i + 1) / ends), stop)
            for i, stop in reversed(list(enumerate(stops)))
        )
        target = AlongPath((*way, Guided(self._law(frame, 1.0))), self.arrive)
        term = ScoreDifference(rollout, target, tau=match.tau, normaliser=match.normaliser)
        return Stage(
            name="distribution backtracking",
            num_steps=match.num_steps,
            share=1.0 - self.record.share,
            terms=(Weighted(term),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=match.critic(rollout),
        )

    def _law(self, frame: Frame, share: float) -> ConstantGuidance:
        """Guidance at a share of the way from the student (unguided) to the teacher."""
        return ConstantGuidance(1.0 + share * (frame.guidance_scale - 1.0))
