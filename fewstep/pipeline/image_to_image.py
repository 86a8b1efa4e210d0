"""Image to image on a scheduler: its grid from the start that a strength means (`start_rules`)."""

from torch import Tensor

from fewstep.schedulers import FewStepScheduler
from fewstep.start_rules import snap_start, start_rule


def start_index(scheduler: FewStepScheduler, strength: float) -> int:
    """The step of the grid whose noise is nearest to a strength; see `snap_start`."""
    return snap_start(scheduler.recipe, scheduler.plan, strength).index


def begin(scheduler: FewStepScheduler, strength: float, rule_name: str) -> Tensor:
    """Set a scheduler to the start that a strength means.

    Args:
        scheduler: Holds a whole grid; holds the plan of this start afterwards.
        strength: 0 to 1.
        rule_name: "snap" or "insert".

    Returns:
        The timesteps to run, on the device of the scheduler's own.

    Raises:
        PipelineError: The rule is unknown or does not go with this strength or recipe.
    """
    start = start_rule(rule_name)(scheduler.recipe, scheduler.plan, strength)
    if start.plan is not scheduler.plan:
        scheduler.install_plan(start.plan, scheduler.timesteps.device)
    scheduler.set_begin_index(start.index)
    return scheduler.timesteps[start.index :]
