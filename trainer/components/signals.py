"""Distribution matching: how what teacher and critic answer becomes the student's gradient."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.trainer import losses
from fewstep.trainer.components.flow_view import flow_time
from fewstep.trainer.components.kernels import Kernel, Renoise
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.targets import GuidanceLaw, Guided, Target, guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import Question, StepContext
from fewstep.trainer.roles import Role


class Normaliser(ABC):
    """Interface: what a score difference is divided by, per sample."""

    @abstractmethod
    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        """Shape (B, 1, ...), above 0."""


@dataclass(frozen=True, slots=True)
class MeanAbs(Normaliser):
    """mean|x0 - target| with a lower bound that keeps it finite at convergence (DMD; CDM)."""

    floor: float = 0.05

    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        return losses.mean_abs_scale(x0, target, self.floor)


@dataclass(frozen=True, slots=True)
class EpsilonVariance(Normaliser):
    """The difference of epsilon predictions times sigma_tau^2, as SDS and VSD weight it (WaDi).

    epsilon_teacher - epsilon_critic = alpha / sigma * (critic - teacher), so the divisor of the x0
    difference is 1 / (alpha sigma): the ends of the schedule count little.
    """

    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        levels = question.probe.levels
        return (levels.alpha * levels.sigma).clamp(min=1e-4).reciprocal()


@dataclass(frozen=True, slots=True)
class FlowTime(Normaliser):
    """tau = sigma / (alpha + sigma): the difference becomes one of velocities (TwinFlow).

    v_critic - v_target = (target - critic) / tau in the flow view of any schedule.
    """

    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        return flow_time(question.probe.levels).clamp(min=1e-4)


class Pull(ABC):
    """Interface: how the student follows a gradient in x0."""

    @abstractmethod
    def loss(self, x0: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
        """A scalar loss of the student.

        Args:
            x0: Student output, shape (B, ...), with its gradient.
            gradient: Where not to go, not normalised, detached; shape of `x0`.
            scale: Normaliser, shape (B, 1, ...), above 0.
        """


@dataclass(frozen=True, slots=True)
class SquaredPull(Pull):
    """The gradient itself: half the squared distance to `x0 - gradient / scale` (DMD)."""

    def loss(self, x0: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
        return losses.surrogate_loss(x0, gradient / scale)


@dataclass(frozen=True, slots=True)
class HuberPull(Pull):
    """Pseudo-Huber distance to `x0 - gradient`, over the scale: every value moves at most as fast.

    Attributes:
        c: Differences below it count squared, above it by their size.

    Source:
        TDM, arXiv:2503.06674 (Luo-Yihong/TDM): c = 0.001.
    """

    c: float = 1e-3

    def loss(self, x0: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
        return losses.pseudo_huber_loss(x0, gradient, scale, self.c)


@dataclass(frozen=True, slots=True)
class ClampedPull(Pull):
    """Half the squared distance to `x0 - clamp(gradient / scale)`: no value is led far.

    Attributes:
        limit: Largest difference of one value.

    Source:
        TwinFlow (inclusionAI/TwinFlow): velocities of the two branches differ by at most 1.
    """

    limit: float = 1.0

    def loss(self, x0: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
        return losses.surrogate_loss(x0, (gradient / scale).clamp(-self.limit, self.limit))


class GradientWeight(ABC):
    """Interface: weights of single samples in the gradient: divergences, rewards."""

    @abstractmethod
    def of(self, context: StepContext, question: Question) -> tuple[Tensor, Tensor]:
        """(attract, repel): factors of the pull to the teacher and the push from the critic.

        Each has shape (B,); equal ones scale the whole gradient.
        """


@dataclass(frozen=True, slots=True)
class ScoreDifference(Term):
    """The student moves along critic minus teacher (DMD and its children).

        gradient = (repel * (critic - x0) - attract * (target - x0)) / normaliser

    attract = repel = 1 is critic minus target.

    Attributes:
        rollout: Where the student is asked.
        target: The teacher's side.
        critic: The other side.
        kernel: How its result is noised.
        tau: To which level.
        normaliser: Per-sample scale.
        weights: Further factors, multiplied.
        pull: How the student follows the gradient.
        name: Of its probe; terms of the same name and laws share teacher and critic calls.

    Source:
        Yin et al. 2023, arXiv:2311.18828; Yin et al. 2024 (DMD2), arXiv:2405.14867.
    """

    rollout: Rollout
    target: Target
    critic: Target = Guided(role=Role.CRITIC)
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw()
    normaliser: Normaliser = MeanAbs()
    weights: tuple[GradientWeight, ...] = ()
    pull: Pull = SquaredPull()
    name: str = "dm"

    def loss(self, context: StepContext) -> TermLoss:
        question = context.question(self.rollout, self.kernel, self.tau, self.name)
        x0 = question.rolled.x0
        teacher = self.target.x0(question.probe, context.progress)
        critic = self.critic.x0(question.probe, context.progress)
        with torch.no_grad():
            gradient = self._gradient(context, question, teacher, critic)
            scale = self.normaliser.scale(x0.float(), teacher, question)
        loss = self.pull.loss(x0, gradient, scale)
        health = losses.match_health(x0, teacher, critic)
        return loss, {
            f"loss/{self.name}": loss.item(),
            "health/dm_cos": health.cosine,
            "health/dm_rel_gap": health.relative_gap,
        }

    def _gradient(
        self, context: StepContext, question: Question, teacher: Tensor, critic: Tensor
    ) -> Tensor:
        x0 = question.rolled.x0.float()
        attract = repel = torch.ones(len(x0), device=x0.device)
        for weight in self.weights:
            more_attract, more_repel = weight.of(context, question)
            attract, repel = attract * more_attract, repel * more_repel
        column = (-1, *[1] * (x0.ndim - 1))
        whole = torch.ones((), device=x0.device)
        return losses.score_gradient(
            x0, teacher, critic, whole, attract.reshape(column), repel.reshape(column)
        )


@dataclass(frozen=True, slots=True)
class GuidanceAugmentation(Term):
    """The guidance half of a split score difference, with its own tau law and normaliser.

        gradient = -(w - 1) (cond - uncond) / normaliser

    from T_w - F = (T_c - F) + (w - 1) (T_c - T_u).

    Attributes:
        rollout: Where the student is asked.
        law: w; nothing is left of the term where it is 1.
        kernel: How its result is noised.
        tau: To which level.
        normaliser: Per-sample scale, of x0 against the conditional teacher.
        name: Of its probe.

    Source:
        Decoupled DMD, arXiv:2511.22677, eq. 6 and 8 (CFG augmentation).
    """

    rollout: Rollout
    law: GuidanceLaw
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw()
    normaliser: Normaliser = MeanAbs()
    name: str = "ca"

    def loss(self, context: StepContext) -> TermLoss:
        question = context.question(self.rollout, self.kernel, self.tau, self.name)
        x0 = question.rolled.x0
        cond, _ = question.probe.both(Role.TEACHER)
        with torch.no_grad():
            more = guided(question.probe, Role.TEACHER, self.law) - cond
            gradient = -more / self.normaliser.scale(x0.float(), cond, question)
        loss = losses.surrogate_loss(x0, gradient)
        return loss, {f"loss/{self.name}": loss.item()}
