"""A stage: what is trained, on which rollouts, with which losses, for how long.

A method is one or more stages. A stage is data; who is updated when is decided in the loop.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.preparation import Preparation
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import FullPolicy, SmallerPolicy
from fewstep.trainer.roles import Role


class Action(ABC):
    """Interface: something done to the cast at one moment of a stage.

    Attributes:
        at: Share of the stage done when it happens; 0 is before the first step.
    """

    at: float

    @abstractmethod
    def act(self, cast: Cast) -> None:
        """Do it."""


@dataclass(frozen=True, slots=True)
class Copy(Action):
    """`target = source`: a snapshot, a restart, a student that becomes the teacher."""

    target: Role
    source: Role
    at: float = 0.0

    def act(self, cast: Cast) -> None:
        cast.copy(self.target, self.source)


@dataclass(frozen=True, slots=True)
class Reset(Action):
    """A role as it was added: an update that changes nothing, or the base's own weights.

    Low-rank ups (and rotations) become zero, downs stay as they are.
    """

    role: Role
    at: float = 0.0

    @torch.no_grad()
    def act(self, cast: Cast) -> None:
        policy = cast.policies[self.role.name]
        if isinstance(policy, FullPolicy | SmallerPolicy):
            fresh = dict(policy.network(cast.base).named_parameters())
            for name, parameter in cast.named(self.role):
                parameter.copy_(fresh[name])
            return
        for name, parameter in cast.named(self.role):
            if name.endswith(("lora_B.weight", "lorad_A.weight")):
                parameter.zero_()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a method.

    Attributes:
        name: For logs and the progress bar.
        num_steps: Optimizer steps of the student.
        share: Its part of a run that is given a budget of network evaluations instead.
        terms: Losses of the student; none where only the critic learns (DisBack's record).
        learning_rate: Peak of the student's rate.
        betas: AdamW's, of student and critic.
        critic: How the critic follows; None without one.
        expert: Which student of the route is trained; None trains the only one.
        actions: What happens to the cast on the way.
        uses_data: Whether prompts and samples come from real latents.
        modules: Names of modules trained together with the student.
        rotates_experts: Train all experts of a condition route, one per update in turn.
        preparations: What is made before the run's first step: teacher pairs.
    """

    name: str
    num_steps: int
    share: float = 1.0
    terms: tuple[Weighted, ...] = ()
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    critic: Critic | None = None
    expert: int | None = None
    actions: tuple[Action, ...] = ()
    uses_data: bool = False
    modules: tuple[str, ...] = ()
    rotates_experts: bool = False
    preparations: tuple[Preparation, ...] = ()

    @property
    def trains_student(self) -> bool:
        """Whether the student is updated at all."""
        return bool(self.terms)

    def due(self, before: float, now: float, *, is_first: bool) -> list[Action]:
        """Actions whose moment lies in (before, now], and those at 0 before the first step."""
        return [
            action
            for action in self.actions
            if (is_first and action.at <= now) or before < action.at <= now
        ]
