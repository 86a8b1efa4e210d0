"""How the student's result becomes a noisy sample that teacher and critic can be asked about."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import NoiseSchedule
from fewstep.trainer.components.rollouts import Rolled
from fewstep.trainer.levels import Levels, levels_at


@dataclass(frozen=True, slots=True)
class Noised:
    """The result of a kernel.

    Attributes:
        sample: Shape (B, ...); carries the student's gradient if the rollout did.
        levels: Its levels.
        epsilon: The fresh noise in it, shape (B, ...).
        transition: Standard deviation of that noise in the sample, shape (B, 1, ...).
    """

    sample: Tensor
    levels: Levels
    epsilon: Tensor
    transition: Tensor


class Kernel(ABC):
    """Interface: a noising law from the student's result to a level."""

    @abstractmethod
    def noised(
        self, rolled: Rolled, positions: Tensor, epsilon: Tensor, schedule: NoiseSchedule
    ) -> Noised:
        """A noisy sample at clock positions (B,), made with `epsilon`."""

    @abstractmethod
    def critic_x0(self, rolled: Rolled, noised: Noised) -> Tensor:
        """What a critic must predict at that sample so that its best answer is the exact one."""


@dataclass(frozen=True, slots=True)
class Renoise(Kernel):
    """x_tau = alpha x0 + sigma epsilon, from the student's clean prediction (DMD)."""

    def noised(
        self, rolled: Rolled, positions: Tensor, epsilon: Tensor, schedule: NoiseSchedule
    ) -> Noised:
        levels = levels_at(schedule, positions).like(rolled.x0)
        return Noised(sampling.add_noise(rolled.x0, epsilon, levels), levels, epsilon, levels.sigma)

    def critic_x0(self, rolled: Rolled, noised: Noised) -> Tensor:
        return rolled.x0


@dataclass(frozen=True, slots=True)
class Interval(Kernel):
    """x_tau from where the student's step ends, x_s, by the forward transition s -> tau.

        x_tau = a x_s + b epsilon,   a = alpha_tau / alpha_s,   b^2 = sigma_tau^2 - (a sigma_s)^2

    The score of p(x_tau | x_s) is -epsilon / b, so by Tweedie the critic's exact target is

        x0* = x_s / alpha_s - (alpha_tau sigma_s^2 / (alpha_s^2 b)) epsilon

    whose mean given x_tau is the student's own E[x0 | x_tau]; s = 0 is plain re-noising. It grows
    as 1 / b near s: critics weight it by b^2 (`critics.TransitionWeight`). Positions below s are
    lifted to it with a margin, because nothing is noised backwards.

    Source:
        Phased DMD, arXiv:2510.27684 (velocity form re-derived for any alpha, sigma); TDM,
        arXiv:2503.06674 uses the same transition.
    """

    margin: float = 0.02

    def noised(
        self, rolled: Rolled, positions: Tensor, epsilon: Tensor, schedule: NoiseSchedule
    ) -> Noised:
        s = rolled.following
        if s.sigma == 0.0:
            return Renoise().noised(rolled, positions, epsilon, schedule)
        positions = positions.clamp(min=min(rolled.end_position + self.margin, 1.0))
        levels = levels_at(schedule, positions).like(rolled.x0)
        a = levels.alpha / s.alpha
        b = (levels.sigma.square() - (a * s.sigma).square()).clamp(min=1e-6).sqrt()
        return Noised(a * rolled.end + b * epsilon, levels, epsilon, b)

    def critic_x0(self, rolled: Rolled, noised: Noised) -> Tensor:
        s = rolled.following
        if s.sigma == 0.0:
            return rolled.end
        pull = noised.levels.alpha * s.sigma**2 / (s.alpha**2 * noised.transition)
        return rolled.end / s.alpha - pull * noised.epsilon


@dataclass(frozen=True, slots=True)
class Shared(Kernel):
    """No fresh noise: teacher and critic are asked at the student's own next sample, tau = s.

    Steps that end at clean data have no level to ask at; they are re-noised at their own position.

    Source:
        SD3.5-Flash, timestep sharing.
    """

    def noised(
        self, rolled: Rolled, positions: Tensor, epsilon: Tensor, schedule: NoiseSchedule
    ) -> Noised:
        s = rolled.following
        if s.sigma == 0.0:
            return Renoise().noised(rolled, positions, epsilon, schedule)
        levels = Levels.full(s, len(rolled.x0), rolled.x0.device).like(rolled.x0)
        own = (rolled.end - levels.alpha * rolled.x0) / levels.sigma
        return Noised(rolled.end, levels, own.detach(), levels.sigma)

    def critic_x0(self, rolled: Rolled, noised: Noised) -> Tensor:
        return rolled.x0


@dataclass(frozen=True, slots=True)
class OwnPrediction(Kernel):
    """Noises as `inner`, but the critic is told the student's own clean prediction.

    The critic then answers E[x0_student | x_tau] instead of what Tweedie says of x_tau: the same
    where the noise left in x_s is independent of that prediction (re-noising), biased where a
    deterministic step carried it along. TDM's choice; `critics.ImportanceWeight` goes with it.

    Attributes:
        inner: The noising law.

    Source:
        TDM, arXiv:2503.06674 (Luo-Yihong/TDM).
    """

    inner: Kernel

    def noised(
        self, rolled: Rolled, positions: Tensor, epsilon: Tensor, schedule: NoiseSchedule
    ) -> Noised:
        return self.inner.noised(rolled, positions, epsilon, schedule)

    def critic_x0(self, rolled: Rolled, noised: Noised) -> Tensor:
        return rolled.x0


@torch.no_grad()
def transition_score_x0(noised: Noised) -> Tensor:
    """Tweedie's x0 of one transition, `(x_tau - sigma^2 epsilon / b) / alpha`.

    The definition that `Interval.critic_x0` rearranges, kept for tests: it divides by alpha, which
    is 0 at the start of a flow.
    """
    levels = noised.levels
    score = -noised.epsilon / noised.transition
    return (noised.sample + levels.sigma.square() * score) / levels.alpha
