"""The ways in which experts can take turns, by the names users give them."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.attached_adapter import AdapterWeights
from fewstep.pipeline.experts.by_adapters import AdapterExperts
from fewstep.pipeline.experts.by_fusing import FusedExperts
from fewstep.pipeline.experts.by_hotswap import HotswapExperts
from fewstep.pipeline.experts.switch import ExpertSwitch

Policy = Literal["adapters", "fused", "hotswap"]
POLICIES: dict[Policy, Callable[[DiffusionPipeline, Sequence[AdapterWeights]], ExpertSwitch]] = {
    "adapters": AdapterExperts,
    "fused": FusedExperts,
    "hotswap": HotswapExperts,
}


def check_policy(name: str) -> Policy:
    """A user's word for a policy.

    Raises:
        PipelineError: There is no such policy.
    """
    for known in get_args(Policy):
        if name == known:
            return known
    raise PipelineError(f"experts is {name!r}; use one of {', '.join(map(repr, POLICIES))}")
