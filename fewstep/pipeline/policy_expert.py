"""A policy adapter on a pipeline: a LoRA, and a wider output layer in the network's own place.

The scheduler does the rest: it reads the policy out of what the network says and follows it to the
step's end (`schedulers.policy_step`). Pipelines hand the wide output on as they hand a velocity.
"""

from collections.abc import Mapping
from typing import final

from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.errors import AdapterError, PipelineError, ShapeError
from fewstep.heads.policy_head import PolicyHead
from fewstep.pipeline.attached_adapter import AttachedAdapter, denoiser_of
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.pipeline.lora_layers import offloading_paused
from fewstep.pipeline.policy_output import check_host, install, is_installed, remove
from fewstep.recipe import StepPolicy
from fewstep.trajectory import PlannedStep


@final
class PolicyExpert(ExpertSwitch):
    """An adapter with a policy head; the adapter's scale is the LoRA's, the head is whole or off.

    Args:
        pipe: The pipeline, the LoRA on it.
        inner: What carries the LoRA.
        head: Tensors of the head by parameter name.
        policy: Of the recipe.

    Raises:
        AdapterError: The tensors make no head, or one of another policy or network.
        PipelineError: The denoiser has no place for it.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        inner: ExpertSwitch,
        head: Mapping[str, Tensor],
        policy: StepPolicy,
    ) -> None:
        self._inner = inner
        adapter = inner.adapters[0]
        model = denoiser_of(pipe, adapter.component)
        made = _head(adapter, head)
        check_host(model, made, policy, str(adapter.path))
        with offloading_paused(pipe):
            install(model, made)

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What is on: one adapter."""
        return self._inner.adapters

    @property
    def is_permanent(self) -> bool:
        """Never: the head is not part of the weights."""
        return False

    def before_call(self, planned: PlannedStep) -> None:
        """See `ExpertSwitch.before_call`."""
        self._inner.before_call(planned)

    def turn_to(self, index: int) -> None:
        """See `ExpertSwitch.turn_to`."""
        self._inner.turn_to(index)

    def prepare(self, pipe: DiffusionPipeline) -> str | None:
        """See `ExpertSwitch.prepare`."""
        complaint = self._inner.prepare(pipe)
        adapter = self.adapters[0]
        if not is_installed(denoiser_of(pipe, adapter.component)):
            raise PipelineError(
                f"the policy head of {adapter.path.name} is no longer on {adapter.component}; "
                "unwrap() the pipeline before replacing it, then wrap it again"
            )
        return complaint

    def fuse(self, pipe: DiffusionPipeline) -> None:
        """Refused: the head has no place among the base's weights.

        Raises:
            PipelineError: Always.
        """
        raise PipelineError(
            f"{self.adapters[0].path.name} has a policy head, a wider output layer, which cannot "
            'be fused; experts="fused" merges the LoRA alone for speed'
        )

    def remove(self, pipe: DiffusionPipeline) -> None:
        """See `ExpertSwitch.remove`."""
        self._inner.remove(pipe)
        with offloading_paused(pipe):
            remove(denoiser_of(pipe, self.adapters[0].component))


def _head(adapter: AttachedAdapter, tensors: Mapping[str, Tensor]) -> PolicyHead:
    try:
        return PolicyHead(tensors).requires_grad_(False)
    except ShapeError as error:
        raise AdapterError(f"{adapter.path}: {error}") from error
