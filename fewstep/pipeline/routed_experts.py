"""Several students on one network, each for a group of prompts: the prompt given chooses.

A hook on the denoiser looks at the text embeddings of each call, before it runs, and turns the
expert with the nearest centroid on. One call has one set of weights, so its prompts must belong to
one expert.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import PipelineError, ShapeError
from fewstep.heads.routing import embedding_of_call, nearest
from fewstep.pipeline.attached_adapter import AttachedAdapter, denoiser_of
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.trajectory import PlannedStep


@final
class RoutedExperts(ExpertSwitch):
    """Adapters that take turns between prompts, by whatever policy carries them.

    Args:
        pipe: The pipeline, the adapters on it.
        inner: What carries them.
        names: Of the routes, for messages.
        centroids: Shape (routes, width), in the same order.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        inner: ExpertSwitch,
        names: Sequence[str],
        centroids: Tensor,
    ) -> None:
        self._inner = inner
        self._names = tuple(names)
        self._centroids = centroids
        model = denoiser_of(pipe, inner.adapters[0].component)
        hook: Any = self._before_network  # pyright: ignore[reportAttributeAccessIssue]
        self._handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on, in the order of the recipe's routes."""
        return self._inner.adapters

    @property
    def is_permanent(self) -> bool:
        """Never: several experts cannot be one set of weights."""
        return False

    def before_call(self, planned: PlannedStep) -> None:
        """Nothing: the prompt decides, not the step."""

    def turn_to(self, index: int) -> None:
        """See `ExpertSwitch.turn_to`."""
        self._inner.turn_to(index)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        return self._inner.prepare(pipe)

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """Refused by the policy that carries the adapters: they share one network.

        Raises:
            PipelineError: Always.
        """
        self._inner.fuse(pipe)

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._inner.remove(pipe)
        self._handle.remove()

    @torch.compiler.disable
    def _before_network(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = _signature(type(model)).bind(model, *args, **kwargs).arguments
        try:
            chosen = nearest(embedding_of_call(arguments), self._centroids).tolist()
        except ShapeError as error:
            raise PipelineError(str(error)) from error
        if len(set(chosen)) > 1:
            names = [self._names[index] for index in chosen]
            raise PipelineError(
                f"the prompts of this call belong to different experts of this adapter "
                f"({', '.join(names)}), and one call runs one of them; call the pipeline once per "
                "prompt"
            )
        self._inner.turn_to(chosen[0])


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)
