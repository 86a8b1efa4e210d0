"""Two networks for two intervals of noise, as one network (Wan 2.2)."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class TwoNetworks(nn.Module):
    """Each sample goes to the network of its noise; a batch across the boundary is split.

    Module paths begin with the pipeline's component, `transformer` or `transformer_2`, so an
    adapter's tensors say which network they are for.

    Args:
        transformer: Serves timesteps from the boundary up.
        transformer_2: Serves those below; of the same architecture.
        boundary: In the schedule's clock, 0 to 1000.

    Attributes:
        in_step: Whether several processes hold the networks together. Each then asks both, in the
            same order, a network without samples of its own about a stand-in, whose gradient is 0.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary = boundary
        self.in_step = False

    @property
    def config(self) -> Any:
        """Of the first network; the second one's is the same."""
        return self.transformer.config

    def forward(
        self,
        *,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """What one network returns.

        Args:
            hidden_states: Shape (B, C, frames, h, w).
            timestep: Shape (B,).
            encoder_hidden_states: Shape (B, tokens, width).
            return_dict: Only False.
        """
        assert not return_dict

        def ask(network: nn.Module, rows: Tensor) -> Tensor:
            asked = rows if len(rows) else rows.new_zeros(1)
            answer = network(
                hidden_states=hidden_states[asked],
                timestep=timestep[asked],
                encoder_hidden_states=encoder_hidden_states[asked],
                return_dict=False,
            )[0]
            return answer[: len(rows)]

        is_high = timestep.abs() >= self.boundary  # a twin's time is negative
        high, low = is_high.nonzero().squeeze(1), (~is_high).nonzero().squeeze(1)
        if not len(low) and not self.in_step:
            return (ask(self.transformer, high),)
        if not len(high) and not self.in_step:
            return (ask(self.transformer_2, low),)
        answers = torch.cat([ask(self.transformer, high), ask(self.transformer_2, low)])
        return (answers[torch.cat([high, low]).argsort()],)

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """As diffusers' models: blocks are recomputed in the backward pass by `function`."""
        for network in (self.transformer, self.transformer_2):
            network.enable_gradient_checkpointing(function)  # pyright: ignore[reportCallIssue]
