"""Write a LoRA with a policy head: the wider output layer of a pi-Flow student."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.adapters.head_writer import Texts, scaled_lora, write_kind
from fewstep.adapters.names import shown
from fewstep.adapters.policy_names import POLICY
from fewstep.adapters.writer import Component, Dtype, checked_target, stored
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe, Lora

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"logstd|(means|logweights|norm_out|logstds\.\d+)\.(weight|bias)")


def save_policy_adapter(
    path: Path | str,
    tensors: "Mapping[str, torch.Tensor]",
    head: "Mapping[str, torch.Tensor]",
    *,
    recipe: FewStepRecipe,
    rank: int,
    alpha: float,
    title: str,
    component: Component = "transformer",
    dtype: Dtype = "fp32",
    description: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA with the output layer that makes its network answer with a policy.

    The recipe's `lora.scale` is multiplied into the LoRA; the head is stored as it is, in float32.

    Args:
        path: Target, `*.safetensors`; its folder is made if needed.
        tensors: The LoRA, names as `save_adapter` takes them.
        head: By parameter name, as `heads.policy_head.PolicyHead` takes them.
        recipe: How it is sampled; its `sampler.kind` is "policy".
        rank: Of every module.
        alpha: Of every module.
        title: Name for people.
        component: The pipeline component the modules are in.
        dtype: Stored precision of the LoRA.
        description: A sentence or two for people.
        metadata: More text for the file's metadata.

    Returns:
        The path written.

    Raises:
        AdapterError: The tensors make no LoRA and head, or the recipe is of another kind.
        MissingExtraError: torch is not installed.
    """
    path = checked_target(path, component)
    _check_head(head, recipe)
    kept = stored(head, {}, "fp32")
    lora = scaled_lora(tensors, recipe, rank, alpha, dtype)
    data = {f"{component}.{name}": values for name, values in lora.items()}
    data |= {f"{POLICY}{name}": values for name, values in kept.items()}
    texts = Texts("policy", title, description, metadata or {})
    return write_kind(path, data, dataclasses.replace(recipe, lora=Lora(alpha="baked")), texts)


def _check_head(head: "Mapping[str, torch.Tensor]", recipe: FewStepRecipe) -> None:
    policy = recipe.sampler.policy
    if policy is None:
        raise AdapterError(
            f"a policy head is sampled by sampler.kind 'policy', but the recipe says "
            f"{recipe.sampler.kind!r}; correct the recipe"
        )
    odd = sorted(name for name in head if not _NAME.fullmatch(name))
    lacking = sorted({"means.weight", "means.bias"} - set(head))
    if odd or lacking:
        raise AdapterError(
            f"a policy head has means.weight, means.bias and what docs/adapters.md lists beside "
            f"them, got {shown(odd or sorted(head))}; pass its tensors by those names"
        )
    is_mixture, outputs = "logweights.weight" in head, len(head["means.bias"])
    if is_mixture != (policy.kind == "gm") or outputs % policy.components:
        raise AdapterError(
            f"the recipe's policy is {policy.kind!r} with {policy.components} components, but this "
            f"head {'is a' if is_mixture else 'is no'} mixture and its means have {outputs} "
            "outputs; correct the recipe"
        )
