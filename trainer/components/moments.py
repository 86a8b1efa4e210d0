"""The plainest guard against drift: each picture keeps a mean and a variance like the teacher's."""

from dataclasses import dataclass

from torch import Tensor

from fewstep.trainer.components.pairs import TeacherPairs
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext


@dataclass(frozen=True, slots=True)
class MomentGuard(Term):
    """KL(N(m, v) || N(m_T, v_T)) of every picture's own mean m and variance v.

        0.5 (log(v_T / v) + (v + (m - m_T)^2) / v_T - 1)

    m_T and v_T are the averages of the same two numbers over the teacher's pictures.

    Attributes:
        rollout: Whose x0 is looked at.
        pairs: The teacher's pictures, prepared by the stage.

    Source:
        Decoupled DMD, arXiv:2511.22677, eq. 7; there with the numbers of real pictures for SDXL.
    """

    rollout: Rollout
    pairs: TeacherPairs

    def loss(self, context: StepContext) -> TermLoss:
        mean, variance = picture_moments(context.rolled(self.rollout).x0)
        loss = moment_divergence(mean, variance, *self._teacher())
        return loss, {"loss/moments": loss.item()}

    def _teacher(self) -> tuple[float, float]:
        mean, variance = picture_moments(self.pairs.all.x0)
        return mean.mean().item(), variance.mean().item()


def picture_moments(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each picture over all its values, each of shape (B,)."""
    flat = x0.float().flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


def moment_divergence(
    mean: Tensor, variance: Tensor, teacher_mean: float, teacher_variance: float
) -> Tensor:
    """The mean over pictures of KL(N(mean, variance) || N(teacher_mean, teacher_variance))."""
    share = variance.clamp(min=1e-6) / teacher_variance
    offset = (mean - teacher_mean).square() / teacher_variance
    return 0.5 * (share - share.log() + offset - 1.0).mean()
