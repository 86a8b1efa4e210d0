"""Any schedule seen as a flow: a sample divided by alpha + sigma lies on a straight path.

    z = x / (alpha + sigma) = (1 - tau) x0 + tau epsilon,   tau = sigma / (alpha + sigma)

so velocities epsilon - x0, and averages of them, mean the same for VP and for flow, where the view
is the thing itself. A deterministic step to s with the clean data x0 is

    z_s = z_t - (tau_t - tau_s) u,   u = (z_t - x0) / tau_t

whether x0 is the network's estimate at t or the average over the whole step.
"""

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.levels import Levels, levels_at


def flow_time(levels: Levels) -> Tensor:
    """tau, shape of the levels' sigma."""
    return levels.sigma / (levels.alpha + levels.sigma)


def flow_state(sample: Tensor, levels: Levels) -> Tensor:
    """z, shape of the sample."""
    return sample / (levels.alpha + levels.sigma)


def velocity_of(x0: Tensor, sample: Tensor, levels: Levels) -> Tensor:
    """u = (z - x0) / tau; levels above clean data, shaped like the sample."""
    return (flow_state(sample, levels) - x0) / flow_time(levels)


def jump(sample: Tensor, x0: Tensor, now: Levels, following: Levels) -> Tensor:
    """The deterministic step with levels per sample; from clean data, or to the same level, none.

    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0
    """
    ratio = following.sigma / now.sigma.clamp(min=1e-12)
    moved = ratio * sample + (following.alpha - now.alpha * ratio) * x0
    return torch.where(now.sigma <= following.sigma, sample, moved)


def jump_levels(schedule: NoiseSchedule, positions: Tensor) -> Levels:
    """Levels at clock positions 0 to 1, of which the lowest is clean data itself.

    A VP table has some noise at its first timestep; the end of a trajectory has none.
    """
    levels = levels_at(schedule, positions)
    is_clean = (levels.timestep <= 0.0).reshape(-1, 1, 1, 1)
    alpha = torch.where(is_clean, 1.0, levels.alpha)
    return Levels(levels.timestep, alpha, torch.where(is_clean, 0.0, levels.sigma))


def level_rates(schedule: NoiseSchedule, levels: Levels) -> Levels:
    """Derivatives of timestep, alpha and sigma with respect to tau, shaped as the levels.

    Of a VP table by differences between its neighbours.

    Raises:
        ConfigError: Another schedule.
    """
    if isinstance(schedule, Flow):
        timestep = torch.full_like(levels.timestep, float(schedule.num_train_timesteps))
        one = torch.ones_like(levels.sigma)
        return Levels(timestep, -one, one)
    if not isinstance(schedule, Vp):
        raise ConfigError(f"{type(schedule).__name__} teachers cannot be distilled yet")
    table = schedule.sigmas()
    alphas = np.sqrt(1.0 - table**2)
    slopes = np.stack([np.gradient(alphas), np.gradient(table)]) / np.gradient(
        table / (alphas + table)
    )
    index = levels.timestep.long().cpu()
    found = torch.from_numpy(slopes)[:, index].float().to(levels.sigma.device)
    per_step = 1.0 / torch.from_numpy(np.gradient(table / (alphas + table)))[index]
    timestep = per_step.float().to(levels.timestep.device)
    return Levels(timestep, *(part.reshape(levels.sigma.shape) for part in found))
