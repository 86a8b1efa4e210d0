"""Noise levels of a training batch: one per sample, as tensors ready to broadcast.

Timesteps are drawn in the schedule's own clock: integers for VP tables (that is what epsilon
models were trained on), real numbers for flow. Tables are float64, results float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, Vp
from fewstep.sampling import Prediction


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels of a batch.

    Attributes:
        timestep: The network's clock, shape (B,), float32.
        alpha: Weight of x0, shape (B, 1, 1, 1), float32.
        sigma: Weight of epsilon, shape (B, 1, 1, 1), float32.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def like(self, sample: Tensor) -> "Levels":
        """The same with alpha and sigma broadcastable to `sample`, (B, C, h, w) or with frames."""
        if sample.ndim == self.alpha.ndim:
            return self
        shape = (-1, *[1] * (sample.ndim - 1))
        return Levels(self.timestep, self.alpha.reshape(shape), self.sigma.reshape(shape))

    def twice(self) -> "Levels":
        """The batch, then the batch again: for guidance's two halves."""
        return Levels(
            *(torch.cat([part, part]) for part in (self.timestep, self.alpha, self.sigma))
        )

    @staticmethod
    def full(level: Level, batch_size: int, device: torch.device) -> "Levels":
        """The same level for every sample."""
        timestep, alpha, sigma = (
            torch.full((batch_size,), value, dtype=torch.float32, device=device)
            for value in (level.timestep, level.alpha, level.sigma)
        )
        return Levels(timestep, _column(alpha), _column(sigma))


def levels_at(schedule: NoiseSchedule, position: Tensor) -> Levels:
    """Levels at positions 0 (clean) to 1 (noise) of a schedule.

    Args:
        schedule: VP or flow.
        position: Share of the clock, shape (B,), float.

    Returns:
        The levels; VP timesteps are rounded to the table's integers.
    """
    if isinstance(schedule, Flow):
        sigma = position.double()
        timestep, alpha = sigma * schedule.num_train_timesteps, 1.0 - sigma
    elif isinstance(schedule, Vp):
        timestep = (position.double() * (schedule.num_train_timesteps - 1)).round()
        sigma = torch.from_numpy(schedule.sigmas()).to(position.device)[timestep.long()]
        alpha = (1.0 - sigma.square()).sqrt()
    else:
        raise ConfigError(f"{type(schedule).__name__} teachers cannot be distilled yet")
    return Levels(timestep.float(), _column(alpha.float()), _column(sigma.float()))


def level_at(schedule: NoiseSchedule, position: float) -> Level:
    """One level at a position 0 (clean) to 1 (noise); VP timesteps are rounded, as in batches."""
    clock = position * schedule.uniform_timesteps(1)[0]
    return schedule.level(float(round(clock)) if isinstance(schedule, Vp) else clock)


def position_of(schedule: NoiseSchedule, level: Level) -> float:
    """A level's place on its schedule's clock, 0 (clean) to 1 (noise)."""
    if isinstance(schedule, Vp):
        return level.timestep / (schedule.num_train_timesteps - 1)
    return level.sigma


def positions_of(schedule: NoiseSchedule, levels: Levels) -> Tensor:
    """Places of a batch's levels on the clock, shape (B,), float64; inverse of `levels_at`."""
    if isinstance(schedule, Vp):
        return levels.timestep.double() / (schedule.num_train_timesteps - 1)
    return levels.sigma.double().reshape(-1)


def output_weight(prediction: Prediction, levels: Levels) -> Tensor:
    """What turns a squared x0 error into the squared error of the network's own output.

    flow and v: 1 / sigma^2; epsilon: alpha^2 / sigma^2; x0: 1. Shape (B, 1, 1, 1).
    """
    if prediction == "x0":
        return torch.ones_like(levels.sigma)
    if prediction == "epsilon":
        return (levels.alpha / levels.sigma).square()
    return levels.sigma.square().reciprocal()


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
