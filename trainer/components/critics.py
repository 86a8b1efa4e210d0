"""The critic: a denoiser that follows the student's outputs, so its score is the student's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.sampling import Prediction
from fewstep.trainer import losses
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.kernels import Kernel, Noised, Renoise
from fewstep.trainer.components.probe import LiveProbe
from fewstep.trainer.components.rollouts import Rolled, Rollout
from fewstep.trainer.components.targets import ConstantGuidance, GuidanceLaw, guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Metrics, Term, TermLoss
from fewstep.trainer.context import Question, StepContext
from fewstep.trainer.levels import output_weight
from fewstep.trainer.roles import Role


class CriticWeight(ABC):
    """Interface: the weight of a squared x0 error."""

    @abstractmethod
    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        """Broadcastable to the sample, shape (B, 1, ...)."""


@dataclass(frozen=True, slots=True)
class OutputWeight(CriticWeight):
    """The squared error of the network's own output, as it was trained."""

    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        return output_weight(prediction, noised.levels)


@dataclass(frozen=True, slots=True)
class TransitionWeight(CriticWeight):
    """The output's error times b^2 / sigma^2: bounded where a transition is short.

    Source:
        Phased DMD, arXiv:2510.27684 (there: error times b, weighted by clamped 1 / b^2).
    """

    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        share = (noised.transition / noised.levels.sigma).square()
        return output_weight(prediction, noised.levels) * share


@dataclass(frozen=True, slots=True)
class MinSnr(CriticWeight):
    """min(SNR, gamma) on the x0 error: Hang et al. 2023, arXiv:2303.09556."""

    gamma: float = 5.0

    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        levels = noised.levels
        return (levels.alpha / levels.sigma).square().clamp(max=self.gamma)


@dataclass(frozen=True, slots=True)
class ImportanceWeight(CriticWeight):
    """`inner` times exp(-|e_mix|^2 / 2) / exp(-|e|^2 / 2), means over the sample.

    e is the transition's noise, e_mix the noise that lies in the sample seen from x0:
    samples that plain re-noising would make too are trusted more.

    Source:
        TDM (Luo-Yihong/TDM), importance-weighted fake score.
    """

    inner: CriticWeight = MinSnr()

    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        levels = noised.levels
        mixed = (noised.sample - levels.alpha * rolled.x0) / levels.sigma
        over = tuple(range(1, mixed.ndim))
        log_ratio = 0.5 * (noised.epsilon.square() - mixed.square()).mean(dim=over, keepdim=True)
        return self.inner.of(noised, rolled, prediction) * log_ratio.clamp(-5.0, 5.0).exp()


@dataclass(frozen=True, slots=True)
class SignalWeight(CriticWeight):
    """The output's error times alpha^2: little weight where there is little signal (WaDi)."""

    def of(self, noised: Noised, rolled: Rolled, prediction: Prediction) -> Tensor:
        return output_weight(prediction, noised.levels) * noised.levels.alpha.square()


class CriticExtra(ABC):
    """Interface: a further loss of the critic's update (a discriminator's, real data)."""

    needs_data: bool = False

    @abstractmethod
    def loss(self, context: StepContext, role: Role) -> TermLoss:
        """The loss; rollouts of this context carry no gradient."""


@dataclass(frozen=True, slots=True)
class Critic:
    """How the critic follows the student.

    Attributes:
        rollout: What it learns from.
        learning_rate: Constant.
        updates: Critic steps per student step (TTUR).
        warmup: Critic steps before the first student step of the stage.
        kernel: How the student's result is noised.
        tau: To which level.
        weight: Of the squared error.
        keep: IDA: critic = keep * critic + (1 - keep) * student after each student step; 1 is off.
        role: Whose parameters.
        extras: Further losses of the same update.
        null_share: Share of samples trained under the null prompt, for critics that are guided.
        law: Guidance under which the critic's answer is trained: SiD-LSG's kappa 1; 0 trains it
            without the prompt.
        modules: Names of modules trained beside it: a discriminator's heads.
        trains: False keeps a critic role's updates to the extras (a discriminator alone).

    Source:
        TTUR: DMD2, arXiv:2405.14867; IDA: SenseFlow, arXiv:2506.00523.
    """

    rollout: Rollout
    learning_rate: float = 4e-4
    updates: int = 2
    warmup: int = 50
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw(low=0.0, high=1.0)
    weight: CriticWeight = OutputWeight()
    keep: float = 1.0
    role: Role = Role.CRITIC
    extras: tuple[CriticExtra, ...] = ()
    null_share: float = 0.0
    law: GuidanceLaw = ConstantGuidance()
    modules: tuple[str, ...] = ()
    trains: bool = True

    def loss(self, context: StepContext, role: Role) -> TermLoss:
        """Denoising score matching on what the student draws now, plus the extras."""
        total, metrics = torch.zeros((), device=context.draws.device), dict[str, float]()
        if self.trains:
            total, metrics = self._denoising(context, role)
        for extra in self.extras:
            loss, more = extra.loss(context, role)
            total = total + loss
            metrics |= more
        return total, metrics

    def _denoising(self, context: StepContext, role: Role) -> tuple[Tensor, Metrics]:
        question = context.question(self.rollout, self.kernel, self.tau, "critic")
        condition = context.condition
        if self.null_share > 0.0:
            condition = drop_prompts(context, self.null_share)
        probe = LiveProbe(
            context.backbone,
            question.probe.sample,
            question.noised.levels,
            condition,
            context.null_condition,
        )
        answer = guided(probe, role, self.law)
        loss = score_matching(context, question, answer, self.kernel, self.weight)
        return loss, {"loss/critic": loss.item()}


@dataclass(frozen=True, slots=True)
class DenoisingTerm(Term):
    """A role learns to denoise what a rollout gives, in the student's own update.

    Of the student's twin on the student's rollouts it is TwinFlow's critic: it follows the student
    at every step, with the student's parameters and no second network. Of the student on real
    latents it is flow matching (or denoising) on data.

    Families tell a network its time by layers that adapters leave alone by default; name them in
    lora.targets to let the two branches differ more.

    Attributes:
        rollout: What is noised; no gradient goes into it.
        role: Who learns: the twin of `ScoreDifference`'s critic, or the student.
        kernel: How it is noised.
        tau: To which level.
        weight: Of the squared error.
        name: Of its probe; with the laws of a `ScoreDifference` and its name, rollout and noise are
            made once.

    Source:
        TwinFlow (inclusionAI/TwinFlow), adversarial loss at -t; Lipman et al. 2022,
        arXiv:2210.02747, for data.
    """

    rollout: Rollout
    role: Role = Role.TWIN
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw(low=0.0, high=1.0)
    weight: CriticWeight = OutputWeight()
    name: str = "twin"

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rollout.needs_data

    def loss(self, context: StepContext) -> TermLoss:
        question = context.question(self.rollout, self.kernel, self.tau, self.name)
        probe = question.probe
        answer = context.backbone.x0(self.role, probe.sample, probe.levels, context.condition)
        loss = score_matching(context, question, answer, self.kernel, self.weight)
        return loss, {f"loss/{self.name}": loss.item()}


def score_matching(
    context: StepContext, question: Question, answer: Tensor, kernel: Kernel, weight: CriticWeight
) -> Tensor:
    """Weighted squared error of an x0 answered at a probe; only the answer has a gradient."""
    with torch.no_grad():
        target = kernel.critic_x0(question.rolled, question.noised)
        factor = weight.of(question.noised, question.rolled, context.backbone.prediction)
    return losses.denoising_loss(answer, target.detach(), factor.detach())


def drop_prompts(context: StepContext, share: float) -> Condition:
    """The update's conditions, a share of them replaced by the null condition."""
    both = context.condition.beside(context.null_condition)
    dropped = context.draws.uniform("null-prompt").cpu() < share
    index = torch.arange(len(context.draws))
    return both.take(torch.where(dropped, len(context.draws), index))
