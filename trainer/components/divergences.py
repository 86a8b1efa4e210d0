"""f-divergences as weights of the score difference: f-distill.

    gradient of D_f(p || q) = E_q [ h(r) (score_q - score_p) ],   r = p / q,   h(r) = r^2 f''(r)

p is the data's density (the teacher's), q the student's; r comes from a discriminator. Reverse KL
is h = 1, plain distribution matching.

Source:
    Xu et al. 2025 (f-distill), arXiv:2502.15681, theorem 1 and table 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from fewstep.trainer.components.discriminators import Discriminator, density_ratio
from fewstep.trainer.components.signals import GradientWeight
from fewstep.trainer.context import Question, StepContext
from fewstep.trainer.levels import positions_of
from fewstep.trainer.parallel import summed

Divergence = Literal["rkl", "kl", "js", "softened-rkl", "neyman", "hellinger", "jeffreys"]

WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "softened-rkl": lambda r: 1.0 / (1.0 + r),
    "neyman": lambda r: 1.0 / r,
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1.0 + r,
}
"""h(r) of every divergence, up to a constant factor."""


@final
class RunningMeans(nn.Module):
    """Means of values in bins over the updates before the present one, old ones fading.

    What the present update adds counts from the next one on: so it makes no difference into how
    many parts or over how many processes a batch is cut. Its buffers are part of a checkpoint.

    Args:
        num_bins: Number of means.
        keep: Factor on everything old at each update.
    """

    total: Tensor
    count: Tensor
    fresh_total: Tensor
    fresh_count: Tensor
    step: Tensor

    def __init__(self, num_bins: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        for name in ("total", "count", "fresh_total", "fresh_count"):
            self.register_buffer(name, torch.zeros(num_bins))
        self.register_buffer("step", torch.tensor(-1))

    def at(self, step: int, bins: Tensor, default: float) -> Tensor:
        """Means of some bins, shape of `bins`, float32; `default` for those never met.

        Args:
            step: Of the update that asks; a new one makes the past of what was added since.
            bins: Bin of each sample, int64.
            default: Where nothing is known.
        """
        if step != int(self.step):
            self.total.mul_(self.keep).add_(self.fresh_total)
            self.count.mul_(self.keep).add_(self.fresh_count)
            self.fresh_total.zero_()
            self.fresh_count.zero_()
            self.step.fill_(step)
        known = self.count > 0.0
        means = torch.where(known, self.total / self.count.clamp(min=1e-6), default)
        return means[bins]

    def add(self, bins: Tensor, values: Tensor) -> None:
        """Values of the present update, one per sample."""
        ones = torch.ones_like(values, dtype=torch.float32)
        for mine, new in ((self.fresh_total, values.float()), (self.fresh_count, ones)):
            mine.add_(summed(torch.zeros_like(mine).index_add_(0, bins, new)))


@final
class RatioState(nn.Module):
    """What f-distill remembers: mean ratio per noise level, and mean weight.

    Args:
        num_bins: Of the noise level.
        keep: Of both.
    """

    def __init__(self, num_bins: int = 10, keep: float = 0.95) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.ratios = RunningMeans(num_bins, keep)
        self.weights = RunningMeans(1, keep)


@dataclass(frozen=True, slots=True)
class DivergenceWeight(GradientWeight):
    """h(r) / mean h, with r = clip(exp(logit)) / mean of its noise level.

    Attributes:
        divergence: Which f.
        discriminator: Gives the logit; softplus, at the score term's own samples.
        low: Least r, before its division by the mean.
        high: Largest.
        module: Name of the `RatioState` in the cast.

    Source:
        f-distill, section 3.3: both normalisations; means are of earlier updates instead of the
        batch's own.
    """

    divergence: Divergence
    discriminator: Discriminator
    low: float = 0.1
    high: float = 20.0
    module: str = "ratio"

    @torch.no_grad()
    def of(self, context: StepContext, question: Question) -> tuple[Tensor, Tensor]:
        assert self.discriminator.question(context) is question  # r where the scores are
        state = context.setting.cast.modules[self.module]
        assert isinstance(state, RatioState)
        ratio = density_ratio(self.discriminator.fake_logits(context).detach())
        ratio = ratio.clamp(self.low, self.high)
        places = positions_of(context.backbone.schedule, question.probe.levels)
        bins = (places * state.num_bins).long().clamp(0, state.num_bins - 1).to(ratio.device)
        step, only = context.draws.step, torch.zeros_like(bins)
        even = ratio / state.ratios.at(step, bins, default=1.0)
        state.ratios.add(bins, ratio)
        law = WEIGHTS[self.divergence]
        weight = law(even)
        scaled = weight / state.weights.at(step, only, default=float(law(torch.ones(1))))
        state.weights.add(only, weight)
        return scaled, scaled
