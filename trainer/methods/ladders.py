"""The teacher's grid of jump methods: finer than the student's, and holding all its levels."""

import math

from fewstep.errors import ConfigError
from fewstep.trainer.components.grids import StudentPath, even_path
from fewstep.trainer.methods.method import Frame


def ladder_of(frame: Frame, least: int, *, multiple: int = 1) -> StudentPath:
    """The even grid of at least so many steps that holds the student's grid.

    Args:
        frame: The run.
        least: Fewest steps.
        multiple: Its steps are also a multiple of this.

    Raises:
        ConfigError: The student's grid is a list of its own, not an even one.
    """
    if frame.config.grid.timesteps:
        raise ConfigError(
            f"{frame.config.method.facts.name} halves or walks even grids, but grid.timesteps "
            "names one of its own; leave it out"
        )
    unit = math.lcm(frame.path.num_steps, multiple)
    count = unit * -(-least // unit)
    return even_path(frame.schedule, count, shift=frame.config.grid.shift)
