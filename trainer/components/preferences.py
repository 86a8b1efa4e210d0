"""Pairs of the student's own samples: the better one made more likely, against a reference.

A step that draws fresh noise is a Gaussian policy, so how likely it was is known exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.errors import ConfigError
from fewstep.sampling import step_weights
from fewstep.trainer.components.grids import GridLaw, StudentPath
from fewstep.trainer.components.rewards import Reward, rewards_of
from fewstep.trainer.components.rollouts import step_noise
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.roles import Role


@dataclass(frozen=True, slots=True)
class Walk:
    """One step of a whole trajectory, and where it ended.

    Attributes:
        sample: Where the step started, shape (B, ...).
        reached: Where it went.
        x0: The trajectory's end.
    """

    sample: Tensor
    reached: Tensor
    x0: Tensor


@dataclass(frozen=True, slots=True)
class PsoTerm(Term):
    """Two trajectories per prompt; the reward says which one becomes more likely.

        loss = -log sigmoid(beta * (r_winner - r_loser)),   r = log(clip(pi / pi_reference))

    r is that of one random re-noising step, a mean over the sample's values, so that beta and clip
    do not depend on the size. Outside the clip a sample has no gradient.

    Attributes:
        grid: Of the student; its steps must draw noise.
        reward: Who wins.
        reference: A frozen copy of the student, made before it moves.
        beta: Sharpness.
        clip: The ratio stays within 1 plus or minus this.
        name: Of its draws.

    Source:
        Miao et al. 2024 (PSO), arXiv:2410.03190, online pairs.
    """

    grid: GridLaw
    reward: Reward
    reference: Role
    beta: float = 10.0
    clip: float = 0.1
    name: str = "pso"

    def loss(self, context: StepContext) -> TermLoss:
        path = self.grid.draw(context.draws, self.name)
        index = self._step(context, path)
        walks = [self._walk(context, path, index, side) for side in ("first", "second")]
        with torch.no_grad():
            first, second = (rewards_of(context, self.reward, walk.x0) for walk in walks)
        sign = torch.where(first >= second, 1.0, -1.0)
        ratios = [self._log_ratio(context, path, index, walk) for walk in walks]
        margin = sign * (ratios[0] - ratios[1])
        loss = -functional.logsigmoid(self.beta * margin).mean()
        return loss, {
            "loss/pso": loss.item(),
            "reward/mean": float((first + second).mean() / 2.0),
            "health/pso_margin": margin.mean().item(),
        }

    def _step(self, context: StepContext, path: StudentPath) -> int:
        """A step that draws noise.

        Raises:
            ConfigError: The grid has none.
        """
        noisy = [index for index in range(path.num_steps) if path.needs_noise(index)]
        if not noisy:
            raise ConfigError(
                f"preference pairs need a step that draws noise, but the {path.num_steps}-step "
                f"grid with stochasticity {path.stochasticity:g} has none; set "
                "grid.stochasticity 1 and two steps or more"
            )
        return noisy[context.draws.shared_integer(f"{self.name}/step", 0, len(noisy))]

    @torch.no_grad()
    def _walk(self, context: StepContext, path: StudentPath, index: int, side: str) -> Walk:
        name = f"{self.name}/{side}"
        sample = path.levels[0].sigma * context.normal(f"{name}/noise")
        kept = (sample, sample)
        for here in range(path.num_steps):
            x0 = context.student_x0(sample, path.levels[here], path.levels[here + 1])
            reached = path.advance(sample, x0, here, step_noise(context, name, path, here))
            kept = (sample, reached) if here == index else kept
            sample = reached
        return Walk(*kept, sample)

    def _log_ratio(self, context: StepContext, path: StudentPath, index: int, walk: Walk) -> Tensor:
        now, following = path.levels[index], path.levels[index + 1]
        x0 = context.student_x0(walk.sample, now, following)
        with torch.no_grad():
            before = context.backbone.x0(
                self.reference, walk.sample, context.levels(now), context.condition
            )
        ratio = policy_log_ratio(path, index, walk, x0, before)
        return ratio.clamp(math.log1p(-self.clip), math.log1p(self.clip))


def policy_log_ratio(
    path: StudentPath, index: int, walk: Walk, x0: Tensor, reference_x0: Tensor
) -> Tensor:
    """log pi(reached | sample) - log pi_reference(reached | sample), a mean over the values.

        pi = N(w_sample * sample + w_x0 * x0, w_noise^2)      with `sampling.step_weights`

    Args:
        path: The grid.
        index: The step on it; it draws noise.
        walk: Where it went.
        x0: The policy's prediction at `walk.sample`, shape (B, ...).
        reference_x0: The reference's.

    Returns:
        Shape (B,), 0 where the two predict the same.
    """
    following = path.levels[index + 1]
    via = path.schedule.via(following, path.stochasticity)
    weights = step_weights(path.levels[index], following, via)
    moved = walk.reached - weights.sample * walk.sample
    mine, other = moved - weights.x0 * x0, moved - weights.x0 * reference_x0
    over = tuple(range(1, moved.ndim))
    return (other.square() - mine.square()).mean(dim=over) / (2.0 * weights.noise**2)
