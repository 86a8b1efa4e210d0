"""Where image-to-image starts on a trained grid: by noise level, always with a step to take."""

from fewstep.errors import PipelineError
from fewstep.schedulers import FewStepScheduler


def start_index(scheduler: FewStepScheduler, strength: float) -> int:
    """The step of the grid whose noise is nearest to a strength.

    Strength s means the noise at the fraction s of the schedule's time (for flow: sigma = s).
    Only trained timesteps are used, so few strengths are told apart; stock pipelines instead drop
    a share of the steps, which at low strengths leaves none and returns the input unchanged.

    Args:
        scheduler: Gives the grid in use.
        strength: 0 to 1; of two equally near levels the noisier is taken.

    Raises:
        PipelineError: The strength is not between 0 and 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise PipelineError(f"strength must be 0 to 1, got {strength:g}")
    wanted = strength * scheduler.recipe.base.schedule.num_train_timesteps
    levels = scheduler.levels[:-1]
    return min(range(len(levels)), key=lambda i: (abs(levels[i].timestep - wanted), i))
