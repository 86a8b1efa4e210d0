"""Schedulers for stock diffusers pipelines that obey a recipe."""

from fewstep.schedulers.few_step_scheduler import FewStepScheduler, FewStepSchedulerOutput
from fewstep.schedulers.fresh_noise import NoiseLayout

__all__ = ["FewStepScheduler", "FewStepSchedulerOutput", "NoiseLayout"]
