"""One coordinate system for every schedule: the straight path in which Euler and DDIM are the same.

    y = x / (alpha + sigma) = (1 - time) x0 + time epsilon,    time = sigma / (alpha + sigma)

Any sample of a VP or TrigFlow model is a flow sample after this rescaling, whose velocity is
epsilon - x0 = (y - x0) / time. Plain arithmetic on numbers; works on the boundary only.

Source:
    Karras et al. 2022, arXiv:2206.00364, sec. 2 (schedules differ by scaling and time alone).
"""

import math

from fewstep.errors import ConfigError
from fewstep.noise_schedule import CLEAN, Flow, Level, NoiseSchedule
from fewstep.recipe import Grid, SolverRow


def flow_time(level: Level) -> float:
    """0 at clean data, 1 at noise alone."""
    return level.sigma / (level.alpha + level.sigma)


def flow_scale(level: Level) -> float:
    """What a sample is divided by to be in the frame."""
    return level.alpha + level.sigma


def level_at(schedule: NoiseSchedule, time: float) -> Level:
    """The level of a schedule at a time of the frame.

    Args:
        schedule: Of the base.
        time: 0 to 1.

    Raises:
        ConfigError: The time is outside 0 to 1.
    """
    if not 0.0 <= time <= 1.0:
        raise ConfigError(f"a time of the flow frame must be 0 to 1, got {time:g}")
    if time == 0.0:
        return CLEAN
    sigma = time if isinstance(schedule, Flow) else time / math.hypot(time, 1.0 - time)
    return schedule.level(schedule.timestep_of_sigma(sigma), sigma)


def even_levels(schedule: NoiseSchedule, num_steps: int) -> tuple[Level, ...]:
    """N + 1 levels of the schedule's own even grid, ending at clean data."""
    timesteps = schedule.uniform_timesteps(num_steps)
    return (*(schedule.level(timestep) for timestep in timesteps), CLEAN)


def refined_levels(
    schedule: NoiseSchedule, levels: tuple[Level, ...], factor: int
) -> tuple[Level, ...]:
    """Every step split into `factor` equal parts of the clock; the given levels stay in it.

    Args:
        schedule: Of the base.
        levels: N + 1 descending levels.
        factor: At least 1.

    Returns:
        factor * N + 1 levels; number factor * i is levels[i].
    """
    if factor < 1:
        raise ConfigError(f"a step is split into at least 1 part, got {factor}")
    fine: list[Level] = []
    for now, following in zip(levels, levels[1:], strict=False):
        fine.append(now)
        for part in range(1, factor):
            share = part / factor
            fine.append(schedule.level((1 - share) * now.timestep + share * following.timestep))
    return (*fine, levels[-1])


def grid_of(levels: tuple[Level, ...], solver: tuple[SolverRow, ...] = ()) -> Grid:
    """Levels, the last being the terminal, as a recipe stores them."""
    return Grid(
        timesteps=tuple(level.timestep for level in levels[:-1]),
        sigmas=tuple(level.sigma for level in levels),
        solver=solver,
    )
