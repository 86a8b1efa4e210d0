"""Policies: the velocity at every point of a step, from one network call at its start (pi-Flow).

A network with a wider output layer answers at (sample, sigma) with the parameters of a policy; the
policy then gives clean data, and so the velocity, at any later point without the network:

    DxPolicy   clean data at N times of a segment, read between by straight lines
    GmPolicy   a mixture of K round Gaussians of clean data; the posterior mean in closed form

`roll_out` follows a policy in many small Euler steps. Flow only: x = (1 - sigma) x0 + sigma eps.
Sigmas are plain numbers, one for the whole batch; tensors keep their dtype, float32 or wider.

Source:
    Chen et al. 2025 (pi-Flow), arXiv:2510.14974; the mixture is GMFlow's, Chen et al. 2025,
    arXiv:2504.05304.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from fewstep.errors import ShapeError
from fewstep.noise_schedule import shift_sigma


class Policy(Protocol):
    """Anything that knows clean data, as seen from a point of a step."""

    def x0(self, sample: Tensor, sigma: float) -> Tensor:
        """Clean data as seen from a sample at sigma, above 0. Shape of the sample."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class DxPolicy:
    """Clean data at equally spaced times of a segment.

    The clock is u with sigma = shift u / (1 + (shift - 1) u); the segment goes from u of the step's
    start down by `segment`, to 0 at most. It belongs to the network: a shorter step reads its part.

    Attributes:
        points: Clean data, the segment's end first. Shape (B, N, ...), N at least 2.
        start: u where the network was called.
        segment: Length of the segment on the clock, up to `start`.
        shift: Of the clock.
    """

    points: Tensor
    start: float
    segment: float
    shift: float

    @staticmethod
    def from_output(
        velocities: Tensor, sample: Tensor, sigma: float, *, segment: float, shift: float
    ) -> "DxPolicy":
        """The policy that a network's answer means.

        Args:
            velocities: Shape (B, N, ...).
            sample: What the network saw. Shape (B, ...).
            sigma: Where that was.
            segment: Longest segment on the clock.
            shift: Of the clock.

        Raises:
            ShapeError: There are fewer than two points, or shapes differ.
        """
        _check_shape(velocities, sample)
        if velocities.shape[1] < 2:
            raise ShapeError(f"a dx policy has 2 points or more, got {velocities.shape[1]}")
        start = shift_sigma(sigma, 1.0 / shift)
        points = sample[:, None] - sigma * velocities
        return DxPolicy(points, start, min(segment, start), shift)

    def x0(self, sample: Tensor, sigma: float) -> Tensor:
        """Clean data at this time; the sample is not looked at. Shape (B, ...)."""
        last = self.points.shape[1] - 1
        end = self.start - self.segment
        place = last * (shift_sigma(sigma, 1.0 / self.shift) - end) / self.segment
        place = min(max(place, 0.0), float(last))
        below = min(int(place), last - 1)
        share = place - below
        return (1.0 - share) * self.points[:, below] + share * self.points[:, below + 1]


@final
@dataclass(frozen=True, slots=True, eq=False)
class GmPolicy:
    """A mixture of round Gaussians of equal variance: clean data as seen from where it was made.

    Seen from a later point, each Gaussian N(m, v) becomes, with r = (1 - sigma) / sigma,

        zeta    = r^2 - r_start^2
        nu      = r x / sigma - r_start x_start / sigma_start
        mean    = (m + v nu) / (1 + v zeta)
        logit  += sum over channels of m (nu - zeta m / 2) / (1 + v zeta)

    Attributes:
        means: Shape (B, K, C, ...).
        variance: Shape (B, 1, 1, ...), or one that broadcasts so.
        logits: Log weights, up to a constant. Shape (B, K, 1, ...).
        start: The sample it was made at. Shape (B, C, ...).
        start_sigma: Where that is, above 0.
    """

    means: Tensor
    variance: Tensor
    logits: Tensor
    start: Tensor
    start_sigma: float

    @staticmethod
    def from_output(
        velocities: Tensor,
        log_deviation: Tensor,
        logits: Tensor,
        sample: Tensor,
        sigma: float,
        *,
        temperature: float = 1.0,
    ) -> "GmPolicy":
        """The policy that a network's answer means: a mixture of velocities.

        Args:
            velocities: Means of the Gaussians. Shape (B, K, C, ...).
            log_deviation: Logarithm of their standard deviation. Shape (B, 1, 1, ...).
            logits: Log weights, up to a constant. Shape (B, K, 1, ...).
            sample: What the network saw. Shape (B, C, ...).
            sigma: Where that was.
            temperature: Below 1 for narrower Gaussians and clearer choices among them.

        Raises:
            ShapeError: Shapes differ.
        """
        _check_shape(velocities, sample)
        wanted = (*velocities.shape[:2], 1, *velocities.shape[3:])
        if logits.shape != wanted or log_deviation.ndim != logits.ndim:
            raise ShapeError(
                f"a gm policy has logits {tuple(wanted)} and a log deviation of as many "
                f"dimensions, got {tuple(logits.shape)} and {tuple(log_deviation.shape)}"
            )
        variance = torch.exp(2.0 * log_deviation) * (temperature * sigma * sigma)
        means = sample[:, None] - sigma * velocities
        return GmPolicy(means, variance, logits / temperature, sample, sigma)

    def x0(self, sample: Tensor, sigma: float) -> Tensor:
        """Mean of clean data, given the sample there. Shape (B, C, ...)."""
        ratio, before = (1.0 - sigma) / sigma, (1.0 - self.start_sigma) / self.start_sigma
        zeta = ratio * ratio - before * before
        nu = (ratio / sigma) * sample - (before / self.start_sigma) * self.start
        nu = nu[:, None]
        width = 1.0 + zeta * self.variance
        gained = (self.means * (nu - (0.5 * zeta) * self.means)).sum(2, keepdim=True) / width
        weights = (self.logits + gained).softmax(1)
        return (weights * (self.means + self.variance * nu) / width).sum(1)


def velocity(policy: Policy, sample: Tensor, sigma: float) -> Tensor:
    """`(sample - x0) / sigma`, the flow velocity that a policy gives at a point; sigma above 0."""
    return (sample - policy.x0(sample, sigma)) / sigma


def roll_out(
    policy: Policy, sample: Tensor, now: float, following: float, *, shift: float, substeps: int
) -> Tensor:
    """Follow a policy from one sigma to a lower one, in Euler steps of equal length on its clock.

    Args:
        policy: Made at `now`, or before.
        sample: At `now`. Shape (B, ...).
        now: Sigma, above 0.
        following: Sigma, below it; at 0 the last substep ends at the policy's clean data.
        shift: Of the clock.
        substeps: Of the whole clock; this step takes its share, rounded, one at least.

    Returns:
        The sample at `following`.
    """
    start, end = shift_sigma(now, 1.0 / shift), shift_sigma(following, 1.0 / shift)
    count = max(1, round((start - end) * substeps))
    inner = [shift_sigma(start + (end - start) * i / count, shift) for i in range(1, count)]
    for sigma, lower in zip((now, *inner), (*inner, following), strict=True):
        x0 = policy.x0(sample, sigma)
        sample = x0 + (lower / sigma) * (sample - x0)
    return sample


def _check_shape(velocities: Tensor, sample: Tensor) -> None:
    if (velocities.shape[0], *velocities.shape[2:]) != tuple(sample.shape):
        raise ShapeError(
            f"a policy has velocities (B, components, ...) beside samples (B, ...), got "
            f"{tuple(velocities.shape)} and {tuple(sample.shape)}"
        )
