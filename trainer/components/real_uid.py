"""RealUID: an inverse distillation whose critic also sees real data, without a discriminator.

    critic    alpha |f(x_g) - r u_g|^2 + (1 - alpha) |f(x_r) - (1 - beta) / (1 - alpha) u_r|^2
    student   alpha (|T(x_g) - r u_g|^2 - |f(x_g) - r u_g|^2),   r = beta / alpha

x_g and x_r are noised samples of the student and of the data, u what a network should answer there
(its own output: velocity, epsilon), T the teacher, f the critic. The student's gradient goes
through x_g and u_g. Where the student equals the data, f = T is the critic's best answer and the
student's loss is 0. alpha = beta = 1 needs no data and is UID.

Source:
    RealUID, arXiv:2509.22459 (David-cripto/RealUID); there in flow velocities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.sampling import Prediction
from fewstep.trainer.components.critics import CriticExtra
from fewstep.trainer.components.kernels import Renoise
from fewstep.trainer.components.probe import LiveProbe
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.score_identity import live_probe
from fewstep.trainer.components.targets import ConstantGuidance, GuidanceLaw, guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels, levels_at
from fewstep.trainer.roles import Role


@dataclass(frozen=True, slots=True)
class RealShares:
    """How much of the critic's objective is the student's and how much the data's.

    Attributes:
        alpha: Share of the student's samples.
        beta: Share of the student's targets; near alpha.
    """

    alpha: float = 0.92
    beta: float = 0.94

    @property
    def of_student(self) -> float:
        """What the student's targets are multiplied by."""
        return self.beta / self.alpha

    @property
    def of_data(self) -> float:
        """What the data's targets are multiplied by; 0 where there are none."""
        return (1.0 - self.beta) / (1.0 - self.alpha) if self.alpha < 1.0 else 0.0


def uid_product(target: Tensor, teacher: Tensor, critic: Tensor, shares: RealShares) -> Tensor:
    """alpha (|T - r u|^2 - |f - r u|^2), r = beta / alpha, elementwise; in network outputs."""
    both = teacher + critic - 2.0 * shares.of_student * target
    return shares.alpha * (teacher - critic) * both


@dataclass(frozen=True, slots=True)
class RealUid(Term):
    """The student's side.

    Attributes:
        rollout: Where the student is asked.
        shares: alpha and beta.
        teacher_law: Guidance of the teacher.
        tau: At which noise levels.
        role: The critic's.
    """

    rollout: Rollout
    shares: RealShares = RealShares()
    teacher_law: GuidanceLaw = ConstantGuidance()
    tau: TauLaw = TauLaw()
    role: Role = Role.CRITIC

    def loss(self, context: StepContext) -> TermLoss:
        question = context.question(self.rollout, Renoise(), self.tau, "uid")
        noised, probe = question.noised, live_probe(context, question)
        answers = (guided(probe, Role.TEACHER, self.teacher_law), probe.cond(self.role))
        target, teacher, critic = (
            output_of(context.backbone.prediction, x0, noised.sample, noised.levels)
            for x0 in (question.rolled.x0, *answers)
        )
        loss = uid_product(target, teacher, critic, self.shares).mean()
        return loss, {"loss/uid": loss.item()}


@dataclass(frozen=True, slots=True)
class RealUidCritic(CriticExtra):
    """The critic's side; alpha = beta = 1 is plain denoising score matching.

    Attributes:
        rollout: What it learns from beside the data.
        shares: alpha and beta.
        tau: At which noise levels.
    """

    rollout: Rollout
    shares: RealShares = RealShares()
    tau: TauLaw = TauLaw(low=0.0, high=1.0)

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shares.alpha < 1.0

    def loss(self, context: StepContext, role: Role) -> TermLoss:
        question = context.question(self.rollout, Renoise(), self.tau, "critic")
        noised, rolled = question.noised, question.rolled
        sample = question.probe.sample
        fake = self._error(context, role, rolled.x0, sample, noised.levels, self.shares.of_student)
        loss = self.shares.alpha * fake
        metrics = {"loss/critic": fake.item()}
        if self.needs_data:
            x0 = context.real.x0
            positions = self.tau.positions(
                context.draws.uniform("tau/real"),
                rolled.now,
                rolled.following,
                context.backbone.schedule,
                context.progress,
            )
            levels = levels_at(context.backbone.schedule, positions).like(x0)
            sample = sampling.add_noise(x0, context.normal("epsilon/real"), levels)
            real = self._error(context, role, x0, sample, levels, self.shares.of_data)
            loss = loss + (1.0 - self.shares.alpha) * real
            metrics["loss/critic_real"] = real.item()
        return loss, metrics

    def _error(
        self,
        context: StepContext,
        role: Role,
        x0: Tensor,
        sample: Tensor,
        levels: Levels,
        factor: float,
    ) -> Tensor:
        """Mean squared error of the critic's output against `factor` times the exact one."""
        prediction = context.backbone.prediction
        null = context.null_condition
        probe = LiveProbe(context.backbone, sample, levels, context.condition, null)
        answer = output_of(prediction, probe.cond(role), sample, levels)
        target = output_of(prediction, x0, sample, levels)
        return (answer - factor * target).square().mean()


def output_of(prediction: Prediction, x0: Tensor, sample: Tensor, levels: Levels) -> Tensor:
    """An x0 as the network's own output; sigma is kept above 0, where outputs are not defined."""
    sigma = levels.sigma.clamp(min=torch.finfo(torch.float32).eps)
    kept = Levels(levels.timestep, levels.alpha, sigma)
    return sampling.from_x0(prediction, x0, sample, kept)
