"""Discriminators: small heads on features of the critic or the teacher, at noised samples.

    logit = D(x_tau),   best answer log p_real(x_tau) / p_fake(x_tau)

Real data are the update's own latents, so every fake picture has a real one of its prompt beside
it. The heads learn in the critic's update (`Critic.modules`), the student in its own (`GanTerm`).

Source:
    Yin et al. 2024 (DMD2), arXiv:2405.14867, section 4.3: a head on the critic's bottleneck at
    diffused samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import sampling
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.critics import CriticExtra
from fewstep.trainer.components.features import FeatureShape, FeatureSource, as_tokens
from fewstep.trainer.components.kernels import Kernel, Renoise
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.sizes import real_like
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import Question, StepContext
from fewstep.trainer.levels import Levels
from fewstep.trainer.roles import Role

LARGEST_LOGIT = 10.0


class GanLoss(ABC):
    """Interface: what discriminator and student do about logits, each shape (B,)."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss."""

    @abstractmethod
    def student(self, fake: Tensor) -> Tensor:
        """The student's loss."""


@dataclass(frozen=True, slots=True)
class Softplus(GanLoss):
    """Non-saturating: the best logit is the log density ratio (Goodfellow et al. 2014)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()

    def student(self, fake: Tensor) -> Tensor:
        return functional.softplus(-fake).mean()


@dataclass(frozen=True, slots=True)
class Hinge(GanLoss):
    """Hinge: logits beyond plus or minus 1 teach the discriminator nothing more (ADD, LADD)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean()

    def student(self, fake: Tensor) -> Tensor:
        return -fake.mean()


def density_ratio(logits: Tensor) -> Tensor:
    """r = p_real / p_fake = exp(logit), logits held between -10 and 10; softplus logits only."""
    return logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()


class Head(nn.Module):
    """One layer's opinion: two convolutions or linear layers, mean over places, a linear read-out.

        logit = <v + E c, h>

    v and E start at zero: a fresh discriminator says log ratio 0 everywhere and pushes nobody.

    Args:
        shape: Of the features.
        width: Hidden channels.
        condition_width: Of the pooled prompt c; 0 leaves the prompt out.

    Source:
        The projection of the prompt: Miyato and Koyama 2018, arXiv:1802.05637.
    """

    def __init__(self, shape: FeatureShape, width: int, condition_width: int) -> None:
        super().__init__()
        if shape.is_tokens:
            self.norm: nn.Module = nn.LayerNorm(shape.channels)
            self.first: nn.Module = nn.Linear(shape.channels, width)
            self.second: nn.Module = nn.Linear(width, width)
        else:
            self.norm = nn.GroupNorm(1, shape.channels)
            self.first = nn.Conv2d(shape.channels, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=1)
        self.read_out = nn.Linear(width, 1)
        self.of_prompt = nn.Linear(condition_width, width, bias=False) if condition_width else None
        for layer in (self.read_out, self.of_prompt):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.read_out.bias)

    def forward(self, feature: Tensor, prompt: Tensor) -> Tensor:
        """Logits, shape (B,).

        Args:
            feature: Shape (B, N, C) or (B, C, h, w), float32.
            prompt: Pooled, shape (B, width), float32; not looked at without a condition.
        """
        hidden = functional.silu(self.first(self.norm(feature)))
        hidden = as_tokens(functional.silu(self.second(hidden))).mean(dim=1)
        logit = self.read_out(hidden).squeeze(-1)
        if self.of_prompt is not None:
            logit = logit + (self.of_prompt(prompt) * hidden).sum(dim=-1)
        return logit


@final
class Heads(nn.Module):
    """A head for every layer; their mean is the discriminator's logit.

    Args:
        shapes: Of the features, from `features.shapes_of`.
        width: Hidden channels of every head.
        condition_width: Of the pooled prompt; 0 leaves the prompt out.
    """

    def __init__(
        self, shapes: Sequence[FeatureShape], *, width: int = 64, condition_width: int = 0
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(shape, width, condition_width) for shape in shapes)

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Tensor:
        """Logits, shape (B,), float32.

        Args:
            features: One per head.
            condition: B rows.
        """
        prompt = pooled(condition)
        pairs = zip(self.heads, features, strict=True)
        return torch.stack([head(feature, prompt) for head, feature in pairs]).mean(dim=0)


def pooled(condition: Condition) -> Tensor:
    """One vector per prompt, float32: the pooled embedding, else the mean of its real tokens."""
    if condition.pooled is not None:
        return condition.pooled.float()
    sequence = condition.sequence.float()
    if condition.mask is None:
        return sequence.mean(dim=1)
    real = condition.mask.to(sequence.dtype)[..., None]
    return (sequence * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)


@dataclass(frozen=True, slots=True)
class Discriminator:
    """Who judges, what it looks at, and where on the schedule.

    Attributes:
        source: The features it sees.
        rollout: Whose results are fake.
        kernel: How they are noised; real data are re-noised to the same level.
        tau: To which level.
        loss_law: Softplus or hinge.
        module: Name of its heads in the cast.
        name: Of its probe; a score term's name and laws put both at the same samples.
    """

    source: FeatureSource
    rollout: Rollout
    kernel: Kernel = Renoise()
    tau: TauLaw = TauLaw(low=0.0, high=1.0)
    loss_law: GanLoss = Softplus()
    module: str = "discriminator"
    name: str = "gan"

    def question(self, context: StepContext) -> Question:
        """Where fake samples are judged in this update."""
        return context.question(self.rollout, self.kernel, self.tau, self.name)

    def logits(self, context: StepContext, sample: Tensor, levels: Levels) -> Tensor:
        """Logits of noisy samples, shape (B,), with all gradients."""
        found = self.source.features(context.backbone, sample, levels, context.condition)
        return context.setting.cast.modules[self.module](found, context.condition)

    def fake_logits(self, context: StepContext) -> Tensor:
        """Logits of the update's fake samples, made once; they reach back to the student."""

        def make() -> Tensor:
            noised = self.question(context).noised
            return self.logits(context, noised.sample, noised.levels)

        return context.once(self, make)

    def real_logits(self, context: StepContext, more_noise: float = 0.0) -> Tensor:
        """Logits of the update's real latents at the levels of the fake ones.

        Args:
            context: The update.
            more_noise: Deviation of a disturbance of the clean latents.
        """
        noised = self.question(context).noised
        shape = tuple(noised.sample.shape[1:])
        x0 = real_like(context, shape)
        if more_noise > 0.0:
            x0 = x0 + more_noise * context.draws.normal(f"{self.name}/disturbed", shape)
        epsilon = context.draws.normal(f"{self.name}/real", shape)
        return self.logits(context, sampling.add_noise(x0, epsilon, noised.levels), noised.levels)


@dataclass(frozen=True, slots=True)
class GanTerm(Term):
    """The student tries to look real to a discriminator.

    Attributes:
        discriminator: The judge; it learns in the critic's update.
    """

    discriminator: Discriminator
    needs_data = True

    def loss(self, context: StepContext) -> TermLoss:
        logits = self.discriminator.fake_logits(context)
        loss = self.discriminator.loss_law.student(logits)
        return loss, {f"loss/{self.discriminator.module}_student": loss.item()}


@dataclass(frozen=True, slots=True)
class DiscriminatorLoss(CriticExtra):
    """The discriminator's own loss, beside the critic's.

    Its gradient reaches the heads, and the critic where its features are the critic's (DMD2).

    Attributes:
        discriminator: The judge.
        weight: Against the critic's own loss.
        r1: Weight of the approximate R1 penalty, 0 without: |D(real) - D(real + noise)|^2.
        r1_noise: Deviation of that noise.

    Source:
        Approximate R1: Lin et al. 2025 (APT), arXiv:2501.08316 (there at clean data).
    """

    discriminator: Discriminator
    weight: float = 1e-2
    r1: float = 0.0
    r1_noise: float = 0.1
    needs_data = True

    def loss(self, context: StepContext, role: Role) -> TermLoss:
        judge = self.discriminator
        fake, real = judge.fake_logits(context), judge.real_logits(context)
        loss = judge.loss_law.discriminator(real, fake)
        is_right = ((real > 0.0).float().mean() + (fake < 0.0).float().mean()) / 2.0
        metrics = {
            f"loss/{judge.module}": loss.item(),
            f"health/{judge.module}_accuracy": is_right.item(),
        }
        if self.r1 > 0.0:
            penalty = functional.mse_loss(judge.real_logits(context, self.r1_noise), real)
            loss = loss + self.r1 * penalty
            metrics[f"loss/{judge.module}_r1"] = penalty.item()
        return self.weight * loss, metrics
