"""Adapter kinds that are more than LoRA: whether recipe and file agree, and who carries them."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.adapters import AdapterHeader, adapter_parts
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.names import shown
from fewstep.adapters.policy_names import is_polynomial
from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline.attached_adapter import AdapterWeights, AttachedAdapter
from fewstep.pipeline.experts.files import FoundFile
from fewstep.pipeline.experts.policies import POLICIES, Policy
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.pipeline.policy_expert import PolicyExpert
from fewstep.pipeline.routed_experts import RoutedExperts
from fewstep.pipeline.two_time_expert import TwoTimeExpert
from fewstep.recipe import FewStepRecipe


def check_kinds(recipe: FewStepRecipe, files: Sequence[FoundFile]) -> None:
    """Refuse files of another kind than the recipe names.

    Args:
        recipe: The recipe in force.
        files: The adapter files; none are right for every recipe here.

    Raises:
        AdapterError: One holds what the recipe does not name, or lacks what it names.
    """
    for found in files:
        header = found.header
        parts = adapter_parts(header)
        if parts.routes and not recipe.routes:
            raise AdapterError(
                f"{header.path}: holds the experts {', '.join(sorted(parts.routes))} of a recipe "
                "with routes, but this recipe has none; use the recipe in the file"
            )
        for one in parts.routes.values():
            _check_kind(recipe, one)
        if not parts.routes:
            _check_kind(recipe, header)


def _check_kind(recipe: FewStepRecipe, header: AdapterHeader) -> None:
    parts = adapter_parts(header)
    kind = "lorad" if parts.rotations else "lora"
    if kind != recipe.lora.kind:
        raise AdapterError(
            f"{header.path}: holds {kind!r} tensors, but the recipe's lora.kind is "
            f"{recipe.lora.kind!r}; use the recipe in the file"
        )
    is_flow_map = recipe.sampler.kind == "flow_map"
    if parts.two_time and not is_flow_map:
        raise AdapterError(
            f"{header.path}: holds a head that is told the target time, but the recipe's "
            f"sampler.kind is {recipe.sampler.kind!r}; use the recipe in the file"
        )
    if is_flow_map and not parts.two_time:
        raise AdapterError(
            f"{header.path}: holds no two-time head, but the recipe's sampler is 'flow_map', whose "
            "network is told where each step ends; use the file the recipe was made for, or the "
            "pipeline of its authors"
        )
    _check_policy(recipe, header, has_head=bool(parts.policy))


def _check_policy(recipe: FewStepRecipe, header: AdapterHeader, *, has_head: bool) -> None:
    is_policy = recipe.sampler.kind == "policy"
    if has_head and not is_policy:
        raise AdapterError(
            f"{header.path}: holds a policy head, a wider output layer, but the recipe's "
            f"sampler.kind is {recipe.sampler.kind!r}; use the recipe in the file"
        )
    if is_policy and not has_head:
        raise AdapterError(
            f"{header.path}: holds no policy head, but the recipe's sampler is 'policy', whose "
            "network has a wider output layer; use the file the recipe was made for, or the "
            "pipeline of its authors"
        )
    if has_head and is_polynomial(header.metadata):
        raise AdapterError(
            f"{header.path}: its metadata says that its policy is a polynomial in time, which no "
            "recipe has; use the pipeline of its authors"
        )


def carry(
    pipe: DiffusionPipeline,
    recipe: FewStepRecipe,
    files: Sequence[FoundFile],
    adapters: Sequence[AdapterWeights],
    policy: Policy,
) -> ExpertSwitch:
    """Put adapters on a pipeline, with the head or the router that belongs to them.

    Args:
        pipe: The pipeline.
        recipe: The recipe in force.
        files: Where the adapters were read from.
        adapters: What is put on, in the order of the recipe's experts or routes.
        policy: How adapters take turns.

    Raises:
        AdapterError: They do not fit; the pipeline is left as it was.
        PipelineError: The denoiser has no place for a head, or weights cannot be exchanged.
    """
    centroids = read_centroids(files[0].header, recipe) if recipe.routes else None
    switch = POLICIES[policy](pipe, adapters)
    try:
        if centroids is not None:
            names = [route.adapter for route in recipe.routes]
            return RoutedExperts(pipe, switch, names, centroids)
        if recipe.sampler.policy is not None:
            return PolicyExpert(pipe, switch, adapters[0].head, recipe.sampler.policy)
        if adapters[0].head:
            return TwoTimeExpert(pipe, switch, adapters[0].head)
    except BaseException:
        switch.remove(pipe)
        raise
    return switch


def read_centroids(header: AdapterHeader, recipe: FewStepRecipe) -> Tensor:
    """Centroids in the order of the recipe's routes. Shape (routes, width), float32.

    Raises:
        AdapterError: One is not finite.
    """
    names = adapter_parts(header).centroids
    read = open_tensors(header)
    centroids = torch.stack([read(names[route.adapter]).float() for route in recipe.routes])
    for route, centroid in zip(recipe.routes, centroids, strict=True):
        if not bool(centroid.isfinite().all()):
            raise AdapterError(
                f"{header.path}: {shown(names[route.adapter])} holds NaN or infinity; the file is "
                "damaged, get another one"
            )
    return centroids


def check_no_head(adapters: Sequence[AttachedAdapter]) -> None:
    """Refuse to save a network with a head: no diffusers folder has a place for it.

    Raises:
        PipelineError: An adapter has one.
    """
    heads = {
        "two_time": "a head that tells the network where each step ends",
        "policy": "a policy head, a wider output layer",
    }
    for adapter in adapters:
        if adapter.kind in heads:
            raise PipelineError(
                f"{adapter.path.name} has {heads[adapter.kind]}, which no diffusers folder can "
                "hold and stock diffusers cannot sample; ship the adapter file, or unwrap() to "
                "save the base"
            )
