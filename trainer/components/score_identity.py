"""Score identities: divergences whose gradient flows through teacher and critic themselves.

    y = teacher - critic,   loss = slope(y) . (critic - x0 + (1 - alpha) y) / normaliser

all at x_tau, which carries the student's gradient INTO the frozen networks: without it the loss
would be another one. slope(y) = y for the squared distance; then

    alpha = 1/2   UID, FGM: half of |teacher - x0|^2 - |critic - x0|^2
    alpha = 1     SIM with the squared distance
    alpha = 1.2   SiD's default

Source:
    Zhou et al. 2024 (SiD), arXiv:2404.04057; Luo et al. 2024 (SIM), arXiv:2410.16794; RealUID,
    arXiv:2509.22459.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.trainer import losses
from fewstep.trainer.components.kernels import Kernel, Renoise
from fewstep.trainer.components.probe import LiveProbe
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.signals import MeanAbs, Normaliser
from fewstep.trainer.components.targets import ConstantGuidance, GuidanceLaw, guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import Question, StepContext
from fewstep.trainer.roles import Role


class ScoreDistance(ABC):
    """Interface: a distance of scores, by the derivative that its identity needs."""

    @abstractmethod
    def slope(self, difference: Tensor) -> Tensor:
        """Derivative at teacher - critic, shape (B, ...)."""


@dataclass(frozen=True, slots=True)
class SquaredDistance(ScoreDistance):
    """|y|^2 / 2."""

    def slope(self, difference: Tensor) -> Tensor:
        return difference


@dataclass(frozen=True, slots=True)
class PseudoHuberDistance(ScoreDistance):
    """sqrt(mean y^2 + c^2) - c over a sample: every sample pulls alike, however far off it is.

    Attributes:
        c: Below it the distance is squared.
    """

    c: float = 0.01

    def slope(self, difference: Tensor) -> Tensor:
        over = tuple(range(1, difference.ndim))
        return difference / (difference.square().mean(dim=over, keepdim=True) + self.c**2).sqrt()


@dataclass(frozen=True, slots=True)
class NoNormaliser(Normaliser):
    """Divide by one: pseudo-Huber distances have a scale of their own."""

    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        return torch.ones_like(x0[:1])


def identity_product(
    x0: Tensor, teacher: Tensor, critic: Tensor, alpha: float, distance: ScoreDistance
) -> Tensor:
    """slope(T - F) * (F - x0 + (1 - alpha) (T - F)), elementwise; differentiable in all three.

    Args:
        x0: Student output, shape (B, ...).
        teacher: x0 of the frozen teacher at x_tau, shape (B, ...).
        critic: x0 of the critic there, shape (B, ...).
        alpha: See the module.
        distance: Of scores.
    """
    difference = teacher - critic
    return distance.slope(difference) * (critic - x0 + (1.0 - alpha) * difference)


@dataclass(frozen=True, slots=True)
class ScoreIdentity(Term):
    """SiD, and SIM with another distance.

    Attributes:
        rollout: Where the student is asked.
        alpha: See the module; only the squared distance makes it SiD's.
        distance: Of scores.
        teacher_law: Guidance of the teacher (SiD-LSG's kappa 4).
        critic_law: Guidance of the critic (kappa 2 and 3); below 0 away from the prompt.
        kernel: How the student's result is noised.
        tau: To which level.
        normaliser: Per-sample divisor, no gradient through it.
        role: The critic's.
        name: Of its probe.
    """

    rollout: Rollout
    alpha: float = 1.2
    distance: ScoreDistance = SquaredDistance()
    teacher_law: GuidanceLaw = ConstantGuidance()
    critic_law: GuidanceLaw = ConstantGuidance()
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw()
    normaliser: Normaliser = MeanAbs()
    role: Role = Role.CRITIC
    name: str = "identity"

    def loss(self, context: StepContext) -> TermLoss:
        question = context.question(self.rollout, self.kernel, self.tau, self.name)
        probe = live_probe(context, question)
        x0 = question.rolled.x0
        teacher = guided(probe, Role.TEACHER, self.teacher_law)
        critic = guided(probe, self.role, self.critic_law)
        product = identity_product(x0, teacher, critic, self.alpha, self.distance)
        with torch.no_grad():
            scale = self.normaliser.scale(x0, teacher, question)
        loss = (product / scale).mean()
        health = losses.match_health(x0, teacher, critic)
        return loss, {
            f"loss/{self.name}": loss.item(),
            "health/dm_cos": health.cosine,
            "health/dm_rel_gap": health.relative_gap,
        }


def live_probe(context: StepContext, question: Question) -> LiveProbe:
    """A probe at the same samples that lets the student's gradient through."""
    return LiveProbe(
        context.backbone,
        question.noised.sample,
        question.noised.levels,
        context.condition,
        context.null_condition,
    )
