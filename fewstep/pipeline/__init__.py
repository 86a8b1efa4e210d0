"""FewStepPipeline: any stock diffusers pipeline, sampled by its recipe."""

from fewstep.pipeline.few_step_pipeline import FewStepPipeline
from fewstep.pipeline.guidance import translate_guidance
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.pipeline.teacher_refine import TeacherRefine

__all__ = ["FewStepModularPipeline", "FewStepPipeline", "TeacherRefine", "translate_guidance"]
