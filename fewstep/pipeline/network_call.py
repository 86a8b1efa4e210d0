"""One call of a denoiser as a pipeline made it, so that it can be made again with another sample.

Pipelines differ in how they hand over the sample (Z-Image: a list), the time (FLUX: a thousandth)
and in what they do with the answer (Z-Image: the opposite sign). What is assumed here is proven by
the caller at run time, against what the pipeline made of the same call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.pipeline.families import longest_prefix

SAMPLE_NAMES = ("sample", "hidden_states", "x")
TIME_NAMES = ("timestep", "t")
TIME_TOLERANCE = 1 / 128
"""Relative: bfloat16 networks are told a rounded time."""

CLOCKS: dict[str, Callable[[float, float], float]] = {  # (timestep, scale of the network) -> told
    "Flux": lambda timestep, scale: timestep / 1000.0,
    "QwenImage": lambda timestep, scale: timestep / 1000.0,
    "ZImage": lambda timestep, scale: (1000.0 - timestep) / 1000.0,
    "Sana": lambda timestep, scale: timestep * scale,
}
"""Class name starts with -> what the network is told; others are told the timestep."""


def clock_of(class_name: str, model: nn.Module, timestep: float) -> float:
    """What a pipeline class tells its network at a timestep."""
    prefix = longest_prefix(class_name, dict(CLOCKS))
    if prefix is None:
        return timestep
    scale = getattr(getattr(model, "config", None), "timestep_scale", 1.0)
    return CLOCKS[prefix](timestep, float(scale or 1.0))


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """A call of a denoiser.

    Attributes:
        model: The network.
        arguments: Parameter name -> value.
        output: What it returned.
    """

    model: nn.Module
    arguments: dict[str, Any]
    output: Any

    @property
    def batch_size(self) -> int:
        """Pictures in the call; a guided one holds each twice."""
        return len(self.arguments[self._name(SAMPLE_NAMES)])

    @property
    def told(self) -> float:
        """The time the network was told, of the first picture."""
        return float(torch.as_tensor(self._time).float().reshape(-1)[0])

    def is_told(self, time: float) -> bool:
        """Whether every picture was told this time, as far as its dtype can say."""
        told = torch.as_tensor(self._time).float().reshape(-1)
        return bool(((told - time).abs() <= TIME_TOLERANCE * max(abs(time), 1e-3)).all())

    def sample_like(self, x0: Tensor) -> Tensor | None:
        """The sample the network saw, in the scheduler's layout; None where it does not fit."""
        return _as_layout(self.arguments[self._name(SAMPLE_NAMES)], x0)

    def output_like(self, x0: Tensor, output: Any = None) -> Tensor | None:
        """The answer as the pipeline hands it to the scheduler; None where it does not fit."""
        answer = self.output if output is None else output
        while isinstance(answer, tuple) or hasattr(answer, "to_tuple"):
            answer = answer[0]
        is_list = isinstance(answer, list)  # Z-Image: the velocity towards the data
        found = _as_layout(answer, x0)
        return -found if is_list and found is not None else found

    def repeat(self, sample: Tensor, time: float) -> Tensor:
        """Make the call again with another sample and time; the answer in the same layout."""
        name, clock = self._name(SAMPLE_NAMES), self._name(TIME_NAMES)
        before = self.arguments[name]
        if isinstance(before, list):
            seen: Any = [
                one.reshape(was.shape).to(was) for one, was in zip(sample, before, strict=True)
            ]
        else:
            seen = sample.reshape(before.shape).to(before)
        was = torch.as_tensor(self._time)
        told = torch.full_like(was, time, dtype=_time_dtype(was))
        output = self.model(**{**self.arguments, name: seen, clock: told})
        answer = self.output_like(sample, output)
        assert answer is not None  # the first call's answer had this layout
        return answer

    @property
    def _time(self) -> Any:
        return self.arguments[self._name(TIME_NAMES)]

    def _name(self, names: tuple[str, ...]) -> str:
        return next(name for name in names if name in self.arguments)


def _as_layout(value: Any, x0: Tensor) -> Tensor | None:
    if isinstance(value, list):
        value = torch.stack([torch.as_tensor(one) for one in value])
    if value.ndim == x0.ndim and value.ndim > 3 and value.shape[1] == 2 * x0.shape[1]:
        value = value.chunk(2, dim=1)[0]  # a learned variance
    return value.reshape(x0.shape).to(x0) if value.numel() == x0.numel() else None


def _time_dtype(was: Tensor) -> torch.dtype:
    """Grids of whole timesteps are told as integers by some pipelines; others need not be whole."""
    return was.dtype if was.is_floating_point() else torch.float32
