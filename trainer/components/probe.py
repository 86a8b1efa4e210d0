"""A noised batch that teacher and critic are asked about; every question is asked once.

Terms that share a kernel and a tau law share the probe, and with it the calls: that is what makes
stacking terms on one another cheap.
"""

from typing import Protocol

import torch
from torch import Tensor

from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.levels import Levels
from fewstep.trainer.roles import Role


class Asked(Protocol):
    """A noised batch and its answers, with gradient (`LiveProbe`) or without (`Probe`)."""

    backbone: Backbone
    sample: Tensor
    levels: Levels

    def cond(self, role: Role) -> Tensor: ...
    def uncond(self, role: Role) -> Tensor: ...
    def both(self, role: Role) -> tuple[Tensor, Tensor]: ...


class Probe:
    """A noised batch and what was answered about it so far. Answers carry no gradient.

    Args:
        backbone: Who is asked.
        sample: Noisy samples, shape (B, ...), detached.
        levels: Of the samples.
        epsilon: The noise that was added to reach them, shape (B, ...).
        condition: B rows.
        null_condition: One row.

    Attributes:
        transition: How the samples came about: standard deviation of `epsilon` in them, shape
            (B, 1, ...); equal to sigma for plain re-noising.
    """

    def __init__(
        self,
        backbone: Backbone,
        sample: Tensor,
        levels: Levels,
        epsilon: Tensor,
        condition: Condition,
        null_condition: Condition,
        transition: Tensor | None = None,
    ) -> None:
        self.backbone = backbone
        self.sample = sample.detach()
        self.levels = levels.like(sample)
        self.epsilon = epsilon
        self.condition = condition
        self.null_condition = null_condition
        self.transition = self.levels.sigma if transition is None else transition
        self._cond: dict[Role, Tensor] = {}
        self._uncond: dict[Role, Tensor] = {}

    @torch.no_grad()
    def cond(self, role: Role) -> Tensor:
        """A role's x0 under the prompt."""
        if role not in self._cond:
            self._cond[role] = self.backbone.x0(role, self.sample, self.levels, self.condition)
        return self._cond[role]

    @torch.no_grad()
    def uncond(self, role: Role) -> Tensor:
        """A role's x0 under the empty prompt."""
        if role not in self._uncond:
            null = self.null_condition.expand(len(self.sample))
            self._uncond[role] = self.backbone.x0(role, self.sample, self.levels, null)
        return self._uncond[role]

    @torch.no_grad()
    def both(self, role: Role) -> tuple[Tensor, Tensor]:
        """(cond, uncond), in one call where neither is known yet."""
        if role not in self._cond and role not in self._uncond:
            self._cond[role], self._uncond[role] = self.backbone.both_x0(
                role, self.sample, self.levels, self.condition, self.null_condition
            )
        return self.cond(role), self.uncond(role)


class LiveProbe:
    """The same questions with gradient: into the sample, and into the role that answers.

    Args:
        backbone: Who is asked.
        sample: Noisy samples, shape (B, ...), with whatever gradient they carry.
        levels: Of the samples.
        condition: B rows.
        null_condition: One row.
    """

    def __init__(
        self,
        backbone: Backbone,
        sample: Tensor,
        levels: Levels,
        condition: Condition,
        null_condition: Condition,
    ) -> None:
        self.backbone = backbone
        self.sample = sample
        self.levels = levels.like(sample)
        self.condition = condition
        self.null_condition = null_condition

    def cond(self, role: Role) -> Tensor:
        """A role's x0 under the prompt."""
        return self.backbone.x0(role, self.sample, self.levels, self.condition)

    def uncond(self, role: Role) -> Tensor:
        """A role's x0 under the empty prompt."""
        null = self.null_condition.expand(len(self.sample))
        return self.backbone.x0(role, self.sample, self.levels, null)

    def both(self, role: Role) -> tuple[Tensor, Tensor]:
        """(cond, uncond) in one call."""
        return self.backbone.both_x0(
            role, self.sample, self.levels, self.condition, self.null_condition
        )
