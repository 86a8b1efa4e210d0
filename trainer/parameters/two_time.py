"""Two-time heads of roles: one place in the network, one head for every role that has one.

A head hangs on a forward hook of the time embedding, as in the pipeline, so that the modules of the
network and the names of its adapters stay what they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError, ShapeError
from fewstep.heads.embedder import timestep_embedder
from fewstep.heads.two_time import TwoTimeHead, add_gap, current_gap
from fewstep.trainer.parameters.policies import LoraPolicy, ParameterPolicy
from fewstep.trainer.roles import current_role

PREFIX = "two_time."
"""Of a head's tensors in a file."""


@dataclass(frozen=True, slots=True)
class TwoTimePolicy(ParameterPolicy):
    """Low-rank adapters, and a head that is told where the step ends.

    Attributes:
        lora: The adapters.
        hidden: Width between the head's layers.
    """

    lora: LoraPolicy
    hidden: int = 128


class RoleHeads(nn.Module):
    """The heads of one network; roles without one are told nothing.

    Args:
        base: The network, whose time embedding gets the hook.

    Raises:
        ConfigError: It has no time embedding that is known.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        try:
            place = timestep_embedder(base)
        except ShapeError as error:
            raise ConfigError(f"{error}; choose a method without a two-time head") from error
        self.width = place.width
        self.heads = nn.ModuleDict()
        place.module.register_forward_hook(self._after_embedding)

    def add(self, role: str, hidden: int, generator: torch.Generator, device: torch.device) -> None:
        """A fresh head, which changes nothing until trained."""
        self.heads[role] = TwoTimeHead(self.width, hidden, generator=generator).to(device)

    def named(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """A role's parameters with their names in a file; none for roles without a head."""
        if role not in self.heads:
            return []
        return [(PREFIX + name, p) for name, p in self.heads[role].named_parameters()]

    def forward(self, gap: Tensor) -> Tensor | None:
        """What the current role adds to the time embedding; None for nothing."""
        role = current_role()
        if role.scale == 0.0 or role.name not in self.heads:
            return None
        return role.scale * self.heads[role.name](gap)

    def _after_embedding(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        gap = current_gap()
        return embedded if gap is None else add_gap(embedded, self, gap)
