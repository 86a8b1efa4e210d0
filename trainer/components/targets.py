"""Who is asked about a probe, and under which guidance: the target x0 of a score term.

x0 = uncond + w(tau) * (cond - uncond)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.trainer.components.probe import Asked, Probe
from fewstep.trainer.levels import Levels, levels_at, positions_of
from fewstep.trainer.roles import Role


class GuidanceLaw(ABC):
    """Interface: the guidance scale as a function of the noise level."""

    @abstractmethod
    def scale(self, position: Tensor) -> Tensor | float:
        """w at clock positions 0 to 1, shape (B,)."""


@dataclass(frozen=True, slots=True)
class ConstantGuidance(GuidanceLaw):
    """The same scale everywhere; 1 is no guidance, 0 the null prompt, below 0 away from it."""

    w: float = 1.0

    def scale(self, position: Tensor) -> Tensor | float:
        return self.w


@dataclass(frozen=True, slots=True)
class IntervalGuidance(GuidanceLaw):
    """Guidance at clock positions low <= tau <= high only.

    1.x-Distill gates it at high noise: low 0, high 0.94 (arXiv id in docs/papers.md).
    """

    w: float
    low: float = 0.0
    high: float = 1.0

    def scale(self, position: Tensor) -> Tensor | float:
        inside = (position >= self.low) & (position <= self.high)
        return torch.where(inside, self.w, 1.0)


class Target(ABC):
    """Interface: an x0 prediction at a probe."""

    @abstractmethod
    def x0(self, probe: Probe, progress: float) -> Tensor:
        """Predicted clean data, shape (B, ...), float32, no gradient."""


@dataclass(frozen=True, slots=True)
class Guided(Target):
    """One role under a guidance law.

    Attributes:
        law: The scale.
        role: Teacher, critic, or another.
    """

    law: GuidanceLaw = ConstantGuidance()
    role: Role = Role.TEACHER

    def x0(self, probe: Probe, progress: float) -> Tensor:
        return guided(probe, self.role, self.law)


def guided(probe: Asked, role: Role, law: GuidanceLaw) -> Tensor:
    """`uncond + w * (cond - uncond)`; calls only the half that counts where w is 1 or 0."""
    scale = law.scale(positions_of(probe.backbone.schedule, probe.levels))
    if isinstance(scale, float | int):
        if scale == 1.0:
            return probe.cond(role)
        if scale == 0.0:
            return probe.uncond(role)
    elif bool((scale == 1.0).all()) and not probe.backbone.in_step:
        return probe.cond(role)
    else:
        scale = scale.reshape(-1, *[1] * (probe.sample.ndim - 1)).float()
    cond, uncond = probe.both(role)
    return probe.backbone.combine(cond, uncond, scale, probe.sample.float())


@dataclass(frozen=True, slots=True)
class Mixture(Target):
    """A weighted mean of targets (Uni-DAD: the source teacher and the one of the new domain).

    Attributes:
        parts: Targets.
        weights: As many; they should sum to 1.
    """

    parts: tuple[Target, ...]
    weights: tuple[float, ...]

    def x0(self, probe: Probe, progress: float) -> Tensor:
        pairs = zip(self.parts, self.weights, strict=True)
        return torch.stack([w * part.x0(probe, progress) for part, w in pairs]).sum(0)


@dataclass(frozen=True, slots=True)
class Solved(Target):
    """The end of several deterministic teacher steps from the probe to clean data (PFD).

    Attributes:
        num_steps: Steps; 1 is the plain prediction.
        law: The scale.
        role: Who steps.
    """

    num_steps: int
    law: GuidanceLaw = ConstantGuidance()
    role: Role = Role.TEACHER

    def x0(self, probe: Probe, progress: float) -> Tensor:
        schedule = probe.backbone.schedule
        start = positions_of(schedule, probe.levels)
        sample, levels = probe.sample, probe.levels
        here = probe
        for index in range(self.num_steps):
            x0 = guided(here, self.role, self.law)
            if index == self.num_steps - 1:
                return x0
            following = levels_at(schedule, start * (1.0 - (index + 1) / self.num_steps))
            following = following.like(sample)
            sample = ddim(sample, x0, levels, following)
            levels = following
            here = Probe(
                probe.backbone,
                sample,
                levels,
                probe.epsilon,
                probe.condition,
                probe.null_condition,
            )
        raise AssertionError("num_steps is at least 1")


@dataclass(frozen=True, slots=True)
class Annealed(Target):
    """A target that starts near the critic and becomes the teacher (DMDR's dynamic guidance).

        x0 = target at the base plus the critic's adapter, scaled by lambda
        lambda = strength * (1 + cos(pi * progress / until)) / 2, 0 after `until`

    A critic with a network of its own is mixed with the teacher in x0 instead.

    Attributes:
        law: The scale.
        role: Whose adapter is blended in.
        strength: lambda at the start.
        until: Share of the stage after which the target is the teacher.

    Source:
        DMDR, arXiv:2511.13649 (vvvvvjdy/dmdr): real score = base + scaled guidance LoRA.
    """

    law: GuidanceLaw
    role: Role = Role.CRITIC
    strength: float = 1.0
    until: float = 0.5

    def blend(self, progress: float) -> float:
        """lambda at a progress."""
        if progress >= self.until:
            return 0.0
        angle = torch.tensor(torch.pi * progress / self.until, dtype=torch.float64)
        return self.strength * float((1.0 + angle.cos()) / 2.0)

    def x0(self, probe: Probe, progress: float) -> Tensor:
        blend = self.blend(progress)
        if blend == 0.0:
            return guided(probe, Role.TEACHER, self.law)
        if self.role.name in probe.backbone.own_networks:  # no adapter that could be scaled
            teacher = guided(probe, Role.TEACHER, self.law)
            return torch.lerp(teacher, guided(probe, self.role, self.law), blend)
        return guided(probe, self.role.scaled(blend), self.law)


@dataclass(frozen=True, slots=True)
class AlongPath(Target):
    """Recorded targets, one after the other, then the last (DisBack's way back to the teacher).

    Attributes:
        stops: Targets in the order they are aimed at.
        arrive: Share of the stage after which the last is aimed at; those before it share that.

    Source:
        DisBack, arXiv:2408.15991.
    """

    stops: tuple[Target, ...]
    arrive: float

    def index(self, progress: float) -> int:
        """Which stop is aimed at, at a progress."""
        last = len(self.stops) - 1
        return last if progress >= self.arrive else int(progress / self.arrive * last)

    def x0(self, probe: Probe, progress: float) -> Tensor:
        return self.stops[self.index(progress)].x0(probe, progress)


def ddim(sample: Tensor, x0: Tensor, now: Levels, following: Levels) -> Tensor:
    """A deterministic step with levels per sample; the same arithmetic as `sampling.step`."""
    epsilon = (sample - now.alpha * x0) / now.sigma
    return sampling.add_noise(x0, epsilon, following)
