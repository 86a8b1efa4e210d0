"""The losses: tensors in, scalar or gradient out, float32. No networks, no sampling, no logging."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.errors import ShapeError


@dataclass(frozen=True, slots=True)
class MatchHealth:
    """Health of one distribution-matching comparison.

    Attributes:
        cosine: Mean cosine of (critic_x0 - x0) and (teacher_x0 - x0): near 1 the critic knows
            the student as well as the teacher knows the data.
        relative_gap: Mean |critic_x0 - teacher_x0| / |teacher_x0 - x0|: what is left to match.
    """

    cosine: float
    relative_gap: float


@torch.no_grad()
def match_health(x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor) -> MatchHealth:
    """How far apart teacher and critic are, seen from the student's output.

    Args:
        x0: Student output, shape (B, ...), any dtype.
        teacher_x0: Teacher's x0 with guidance applied, shape (B, ...).
        critic_x0: Critic's x0, shape (B, ...).

    Raises:
        ShapeError: The three shapes differ.
    """
    if not x0.shape == teacher_x0.shape == critic_x0.shape:
        raise ShapeError(
            f"x0 {tuple(x0.shape)}, teacher {tuple(teacher_x0.shape)} and critic "
            f"{tuple(critic_x0.shape)} must have one shape"
        )
    to_teacher, to_critic = teacher_x0.float() - x0.float(), critic_x0.float() - x0.float()
    cosine = functional.cosine_similarity(to_teacher.flatten(1), to_critic.flatten(1))
    gap = (to_critic - to_teacher).flatten(1).norm(dim=1)
    relative = gap / to_teacher.flatten(1).norm(dim=1).clamp(min=1e-12)
    return MatchHealth(cosine.mean().item(), relative.mean().item())


def surrogate_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0 is `gradient / x0.numel()`.

        0.5 * mean (x0 - stopgrad(x0 - gradient))^2

    Source: Yin et al. 2024 (DMD2), arXiv:2405.14867.
    """
    x0 = x0.float()
    return 0.5 * functional.mse_loss(x0, (x0 - gradient).detach())


def denoising_loss(critic_x0: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """Denoising score matching of the critic on student images, mean of weight * error^2.

    Args:
        critic_x0: Critic's prediction at a freshly renoised student image, shape (B, ...).
        x0: That student image, detached, shape (B, ...).
        weight: `levels.output_weight`, broadcastable; makes it the network's own output error.
    """
    return (weight * (critic_x0.float() - x0.float()).square()).mean()


def trajectory_loss(reached: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """Squared distance of one student step from the teacher's end point, relative to its length.

        mean (reached - target)^2 / mean (target - start)^2        per sample, then averaged

    The division makes every step of the grid count alike, whatever its noise level.

    Source:
        Zhou et al. 2024 (SFD), arXiv:2409.19681, trajectory matching; the scaling is ours.
    """
    over = tuple(range(1, start.ndim))
    length = (target - start).float().square().mean(dim=over).clamp(min=1e-8)
    return ((reached.float() - target.float()).square().mean(dim=over) / length).mean()
