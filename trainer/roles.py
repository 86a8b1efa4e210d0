"""Which adapter a forward pass uses: teacher, student, critic and others on one frozen base.

The role is a context variable read inside every adapted layer. Nothing toggles requires_grad and no
adapter is ever "set", so a backward pass cannot meet another role than its forward did; blocks
recomputed by gradient checkpointing restore the role they ran forward with (`role_checkpoint`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class Role:
    """Who a network call speaks for.

    Attributes:
        name: Of the adapter or network; a name nobody has is the frozen base alone.
        scale: Multiplies the adapter's effect (DMDR blends the critic into its target).
        clock: -1 for a twin: the network is told -t. The sine half of its time embedding then
            changes sign, so that one set of parameters can hold two denoisers.
    """

    name: str
    scale: float = 1.0
    clock: Literal[1, -1] = 1

    TEACHER: ClassVar["Role"]
    STUDENT: ClassVar["Role"]
    CRITIC: ClassVar["Role"]
    AVERAGE: ClassVar["Role"]
    TWIN: ClassVar["Role"]

    def expert(self, index: int) -> "Role":
        """The role's adapter for one phase or group of conditions."""
        return replace(self, name=f"{self.name}-{index}")

    def scaled(self, scale: float) -> "Role":
        """The same adapter at another strength."""
        return replace(self, scale=scale)

    def twin(self) -> "Role":
        """The same adapter at negative time: a critic without parameters of its own.

        Source:
            TwinFlow (inclusionAI/TwinFlow): the self-adversarial branch lives at -t.
        """
        return replace(self, clock=-1)


Role.TEACHER = Role("teacher")
Role.STUDENT = Role("student")
Role.CRITIC = Role("critic")
Role.AVERAGE = Role("average")
Role.TWIN = Role.STUDENT.twin()

_CURRENT: ContextVar[Role] = ContextVar("fewstep_role", default=Role.TEACHER)


def current_role() -> Role:
    """The role of the network call in progress."""
    return _CURRENT.get()


@contextmanager
def acting_as(role: Role) -> Iterator[None]:
    """Network calls inside the block use this role's adapter."""
    token = _CURRENT.set(role)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def role_checkpoint(function: Callable[..., Any] | nn.Module, *args: Any) -> Any:
    """Gradient checkpointing that recomputes a block under the role of its forward pass.

    Give it to diffusers: `model.enable_gradient_checkpointing(role_checkpoint)`. Plain
    `torch.utils.checkpoint` recomputes under whatever role is active during backward, which gives
    silently wrong gradients (tests/trainer/test_roles.py holds the table).
    """
    role = current_role()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), acting_as(role)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
