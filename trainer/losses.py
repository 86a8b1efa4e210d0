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


@torch.no_grad()
def score_gradient(
    x0: Tensor,
    teacher_x0: Tensor,
    critic_x0: Tensor,
    scale: Tensor,
    attract: Tensor | float = 1.0,
    repel: Tensor | float = 1.0,
) -> Tensor:
    """Direction that moves student images toward the teacher's distribution.

        gradient = (repel * (critic_x0 - x0) - attract * (teacher_x0 - x0)) / scale

    Follow it downhill: it is zero when critic and teacher agree (attract = repel = 1: critic minus
    teacher). All three are predictions at the same renoised sample.

    Args:
        x0: Student output, shape (B, ...), any dtype.
        teacher_x0: Teacher's x0 with guidance applied, shape (B, ...).
        critic_x0: Critic's x0, shape (B, ...).
        scale: Normaliser, broadcastable, above 0.
        attract: Factor of the pull to the teacher, broadcastable.
        repel: Factor of the push from the critic, broadcastable.

    Source:
        Yin et al. 2023, arXiv:2311.18828 (gradient); attract and repel as in AMD.
    """
    x0 = x0.float()
    push, pull = repel * (critic_x0.float() - x0), attract * (teacher_x0.float() - x0)
    return (push - pull) / scale


@torch.no_grad()
def mean_abs_scale(x0: Tensor, target: Tensor, floor: float) -> Tensor:
    """`max(mean|x0 - target|, floor)` per sample, shape (B, 1, ...): DMD's normaliser.

    Args:
        x0: Student output, shape (B, ...).
        target: Teacher's x0, shape (B, ...).
        floor: Lower bound in x0 units; keeps the gradient finite at convergence (as in CDM).
    """
    over = tuple(range(1, x0.ndim))
    return (x0.float() - target.float()).abs().mean(dim=over, keepdim=True).clamp(min=floor)


def surrogate_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0 is `gradient / x0.numel()`.

        0.5 * mean (x0 - stopgrad(x0 - gradient))^2

    Source: Yin et al. 2024 (DMD2), arXiv:2405.14867.
    """
    x0 = x0.float()
    return 0.5 * functional.mse_loss(x0, (x0 - gradient).detach())


def pseudo_huber_loss(x0: Tensor, gradient: Tensor, scale: Tensor, c: float) -> Tensor:
    """A loss whose gradient with respect to x0 has bounded values.

        mean (sqrt(d^2 + c^2) - c) / scale,   d = x0 - stopgrad(x0 - gradient)

    Its gradient is `gradient / sqrt(gradient^2 + c^2) / scale / x0.numel()`.

    Args:
        x0: Student output, shape (B, ...).
        gradient: The difference it should lose, detached, shape of `x0`.
        scale: Broadcastable, above 0.
        c: Where the loss turns from squared to absolute, above 0.
    """
    difference = x0.float() - (x0.float() - gradient).detach()
    return (((difference.square() + c * c).sqrt() - c) / scale).mean()


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
