"""Plain imitation of the teacher's denoising: for students that cannot start as a copy of it."""

from dataclasses import dataclass

from fewstep.trainer import losses
from fewstep.trainer.components.kernels import Renoise
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.targets import Guided, Target
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import output_weight
from fewstep.trainer.roles import Role


@dataclass(frozen=True, slots=True)
class TeacherScoreMatching(Term):
    """The student, as a denoiser at any noise, says what the teacher says there.

        weight * |student(x_tau) - teacher(x_tau)|^2,    x_tau = the rollout's result re-noised

    Attributes:
        rollout: Whose results are noised; they carry no gradient here.
        role: The student.
        target: The teacher's side; without guidance, as the student is guided by nothing yet.
        tau: To which level.

    Source:
        MSD, arXiv:2410.23274, teacher score matching; there on real data.
    """

    rollout: Rollout
    role: Role = Role.STUDENT
    target: Target = Guided()
    tau: TauLaw = TauLaw()

    def loss(self, context: StepContext) -> TermLoss:
        question = context.without_grad().question(self.rollout, Renoise(), self.tau, "tsm")
        probe = question.probe
        answer = context.backbone.x0(self.role, probe.sample, probe.levels, context.condition)
        wanted = self.target.x0(probe, context.progress)
        weight = output_weight(context.backbone.prediction, probe.levels)
        loss = losses.denoising_loss(answer, wanted, weight)
        return loss, {"loss/tsm": loss.item()}
