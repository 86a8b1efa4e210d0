"""FewStepPipeline: any stock diffusers pipeline, sampled by its recipe."""

from fewstep.pipeline.few_step_pipeline import FewStepPipeline
from fewstep.pipeline.guidance import translate_guidance

__all__ = ["FewStepPipeline", "translate_guidance"]
