"""The two-time head: a network is told the time its step ends at, beside the time it starts at.

    time embedding + linear_2(silu(linear_1(sinusoid(t - s))))

t and s are timesteps of the schedule's clock (0 to 1000), t of the sample, s the target: of a
recipe's grid, this level's and the following one's. `linear_2` starts at zero, so that a fresh head
changes nothing. The network then gives the average velocity between t and s, and the deterministic
step x - (sigma_t - sigma_s) u is exact.

Source:
    Geng et al. 2025 (MeanFlow), arXiv:2505.13447: conditioning on t and on t - s.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ShapeError

CHANNELS = 256
"""Channels of the sinusoid; the width that diffusion transformers use for their timestep."""
MAX_PERIOD = 10000.0

_GAP: ContextVar[Tensor | None] = ContextVar("fewstep_gap", default=None)


def sinusoid(values: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of values at geometrically spaced frequencies.

    Args:
        values: Shape (B,), any dtype.
        channels: Even.

    Returns:
        Shape (B, channels), float32 (float64 for float64 values).
    """
    kind = torch.promote_types(values.dtype, torch.float32)
    steps = torch.arange(channels // 2, dtype=kind, device=values.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) / (channels // 2) * steps)
    angles = values.to(kind)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)


@final
class TwoTimeHead(nn.Module):
    """What the gap between two times adds to a time embedding; nothing until trained.

    In a file its tensors are `two_time.linear_1.weight`, `two_time.linear_1.bias` and the same of
    `linear_2`.

    Args:
        width: Of the time embedding it is added to (`fewstep.heads.embedder`).
        hidden: Width between its layers.
        channels: Of the sinusoid, even.
        generator: Source of the random first layer, on the CPU; None takes torch's own.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        channels: int = CHANNELS,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = _uninitialised(channels, hidden)
        self.linear_2 = _uninitialised(hidden, width)
        bound = 1.0 / math.sqrt(channels)
        with torch.no_grad():
            for parameter in self.linear_1.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
            for parameter in self.linear_2.parameters():
                parameter.zero_()

    def forward(self, gap: Tensor) -> Tensor:
        """What is added.

        Args:
            gap: t - s. Shape (B,).

        Returns:
            Shape (B, width), the dtype of the head.
        """
        seen = sinusoid(gap, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(seen)))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "TwoTimeHead":
        """The head of a file, in float32 on the CPU.

        Args:
            tensors: `linear_1.weight` (hidden, channels), `linear_1.bias`, `linear_2.weight`
                (width, hidden), `linear_2.bias`.

        Raises:
            ShapeError: Names or shapes are not those of a head.
        """
        first, second = tensors.get("linear_1.weight"), tensors.get("linear_2.weight")
        if first is None or second is None or first.ndim != 2 or second.ndim != 2:
            raise ShapeError(f"a two-time head has two linear layers, got {sorted(tensors)}")
        head = TwoTimeHead(second.shape[0], first.shape[0], first.shape[1])
        wanted = {name: tuple(p.shape) for name, p in head.state_dict().items()}
        found = {name: tuple(values.shape) for name, values in tensors.items()}
        if found != wanted or first.shape[1] % 2:
            raise ShapeError(f"a two-time head of this size has {wanted}, got {found}")
        head.load_state_dict(dict(tensors))
        return head


def _uninitialised(inputs: int, outputs: int) -> nn.Linear:
    """A layer that draws nothing from torch's own stream."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))


@contextmanager
def target_time(target: Tensor, now: Tensor) -> Iterator[None]:
    """Network calls inside the block are told where they jump to; without it a head adds nothing.

    Args:
        target: s, where the step ends, in timesteps of the schedule (0 to 1000; 0 is clean data).
            Shape (B,), or (1,) for a whole batch.
        now: t, where the sample is, the same.
    """
    token = _GAP.set(now - target)
    try:
        yield
    finally:
        _GAP.reset(token)


def current_gap() -> Tensor | None:
    """t - s of the network call in progress; None where no target time was told."""
    return _GAP.get()


def add_gap(embedded: Tensor, head: nn.Module, gap: Tensor, scale: float = 1.0) -> Tensor:
    """A time embedding that also knows the gap.

    Args:
        embedded: Shape (B, width), or more sizes between (a time for each token).
        head: A `TwoTimeHead`, or a module called like one; None from it adds nothing.
        gap: t - s. Shape (B,) or (1,).
        scale: Multiplies what is added.

    Returns:
        Shape and dtype of `embedded`.
    """
    added = head(gap.to(embedded.device))
    return embedded if added is None else embedded + (scale * added).to(embedded.dtype)


@final
class TwoTimeEmbedding(nn.Module):
    """A time embedding with a head beside it; takes the place of the embedding in its model.

    Args:
        embedding: What was there: the module from the sinusoidal projection to the hidden size.
        head: A `TwoTimeHead`, or a module called like one: `head(gap)` gives what is added, or
            None for nothing, so that a trainer may choose among several.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding  # first: models ask for the dtype of the first parameter
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The embedding's output, with the gap's share inside `target_time`."""
        embedded = self.embedding(*args, **kwargs)
        gap = current_gap()
        return embedded if gap is None else add_gap(embedded, self.head, gap)
