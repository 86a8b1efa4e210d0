"""A two-time adapter on a pipeline: a LoRA, and a head beside the network's time embedding.

The head hangs on a forward hook, so the model's modules and their names stay those of diffusers.
The scheduler says which step comes next; the gap from its level to the following one is kept as a
tensor that is overwritten in place, so that `torch.compile` makes one graph for all steps.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError, ShapeError
from fewstep.heads.embedder import EmbedderPlace, timestep_embedder
from fewstep.heads.two_time import TwoTimeHead, add_gap
from fewstep.pipeline.attached_adapter import AttachedAdapter, denoiser_of
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.trajectory import PlannedStep


@final
class TwoTimeExpert(ExpertSwitch):
    """An adapter with a head; the head's share is multiplied by the adapter's scale.

    Args:
        pipe: The pipeline, the LoRA on it.
        inner: What carries the LoRA.
        head: Tensors of the head by parameter name.

    Raises:
        AdapterError: The tensors make no head, or one of another width.
        PipelineError: The denoiser has no time embedding it could be added to.
    """

    def __init__(
        self, pipe: DiffusionPipeline, inner: ExpertSwitch, head: Mapping[str, Tensor]
    ) -> None:
        adapter = inner.adapters[0]
        self._inner = inner
        self._scale = adapter.scale
        self._gap = torch.zeros(1)
        place = _place(denoiser_of(pipe, adapter.component))
        self._head = _head(adapter, head, place)
        self._handle = place.module.register_forward_hook(self._after_embedding)

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on: one adapter."""
        return self._inner.adapters

    @property
    def is_permanent(self) -> bool:
        """Never: the head is not part of the weights."""
        return False

    def before_call(self, planned: PlannedStep) -> None:
        """Remember how far this step goes."""
        self._inner.before_call(planned)
        self._gap.fill_(planned.level.timestep - planned.following.timestep)

    def turn_to(self, index: int) -> None:
        """See `ExpertSwitch.turn_to`."""
        self._inner.turn_to(index)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        return self._inner.prepare(pipe)

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """Refused: the head has no place among the base's weights.

        Raises:
            PipelineError: Always.
        """
        raise PipelineError(
            f"{self.adapters[0].path.name} has a head that tells the network where each step ends, "
            'which cannot be fused; experts="fused" merges the LoRA alone for speed'
        )

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._inner.remove(pipe)
        self._handle.remove()

    def _after_embedding(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if self._head.linear_1.weight.device != embedded.device:  # it was moved, or is offloaded
            self._head.to(embedded.device)
        return add_gap(embedded, self._head, self._gap, self._scale)


def _place(model: nn.Module) -> EmbedderPlace:
    try:
        return timestep_embedder(model)
    except ShapeError as error:
        raise PipelineError(
            f"{error}; use a base of the family the adapter was made for"
        ) from error


def _head(
    adapter: AttachedAdapter, tensors: Mapping[str, Tensor], place: EmbedderPlace
) -> TwoTimeHead:
    try:
        head = TwoTimeHead.from_tensors(tensors)
    except ShapeError as error:
        raise AdapterError(f"{adapter.path}: {error}; save the file again") from error
    if head.linear_2.out_features != place.width:
        raise AdapterError(
            f"{adapter.path}: its two-time head gives {head.linear_2.out_features} values, but "
            f"{place.path} of this base has {place.width}; use an adapter made for this base"
        )
    return head.requires_grad_(False)
