"""What every family's backbone takes from its stock pipeline: schedule and recipe facts."""

from abc import ABC
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.errors import ConfigError, PipelineError
from fewstep.pipeline.stock_base import describe_base
from fewstep.recipe import Base, ResolutionShift
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.latents import LatentLayout
from fewstep.trainer.backbones.settings import EdgeSettings


class PipelineBackbone(Backbone, ABC):
    """A family: schedule and prediction are what the pipeline's own scheduler says.

    Args:
        pipe: A loaded stock pipeline with the scheduler it came with.
        layout: Sizes of its latents.
        settings: What the user chose.
        default_length: Text tokens the pipeline takes when it is called; 0 where its text length
            is fixed.
        takes_guidance: Whether its network has a guidance input.

    Raises:
        ConfigError: The scheduler is of no kind that recipes know, or a setting has no effect here.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        layout: LatentLayout,
        settings: EdgeSettings,
        *,
        default_length: int,
        takes_guidance: bool = False,
    ) -> None:
        name = type(pipe).__name__
        if settings.max_sequence_length and not default_length:
            raise ConfigError(
                f"max_sequence_length is {settings.max_sequence_length}, but the text length of "
                f"{name} is fixed; set it to 0"
            )
        if settings.embedded_guidance is not None and not takes_guidance:
            raise ConfigError(
                f"embedded_guidance is {settings.embedded_guidance:g}, but guidance is no input of "
                f"this {name}; leave it out"
            )
        try:
            self._facts = describe_base(pipe, own_mu(pipe, layout.num_tokens))
        except PipelineError as error:
            raise ConfigError(f"{name} cannot be distilled: {error}") from error
        super().__init__(
            pipe, self._facts.schedule.build(), self._facts.prediction, settings.max_sequence_length
        )
        self.layout = layout
        self.text_length = settings.max_sequence_length or default_length

    def base(self, model_id: str) -> Base:
        return replace(
            self._facts,
            family=self.family,
            model_id=model_id,
            max_sequence_length=self.max_sequence_length or None,
        )


def own_mu(pipe: DiffusionPipeline, num_tokens: int) -> float | None:
    """The shift that a pipeline computes at the model's own size; None where it is fixed.

    Args:
        pipe: The pipeline.
        num_tokens: Image tokens at that size.
    """
    config: Any = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    shift = ResolutionShift(
        base_shift=float(config.get("base_shift", 0.5)),
        max_shift=float(config.get("max_shift", 1.15)),
        base_tokens=int(config.get("base_image_seq_len", 256)),
        max_tokens=int(config.get("max_image_seq_len", 4096)),
    )
    return shift.mu(num_tokens, num_steps=1)
