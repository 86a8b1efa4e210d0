"""peft's LoRA layers inside a pipeline's components: find them, put them on, take them off.

Everything goes through peft itself, for pipelines with a LoRA loader of their own and for those
without (PixArt, modular ones); the bookkeeping that diffusers looks at is kept, so that
`set_adapters`, `get_active_adapters`, `delete_adapters` and offloading go on working.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from diffusers.utils.torch_utils import is_compiled_module
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class Angles:
    """Low-rank angles of one layer: the column pairs of its weight are turned by a @ b.

    Attributes:
        a: Shape (out, r).
        b: Shape (r, in / 2).
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """LoRA of one model, in the model's own names.

    Attributes:
        tensors: `<module>.lora_A.weight` (rank, in, ...), `<module>.lora_B.weight` (out, rank, ...)
            and, for DoRA, `<module>.lora_magnitude_vector.weight`.
        ranks: Module -> rank.
        alphas: Module -> alpha; the module's scale is alpha / rank.
        extras: Parameter name -> what is added to it whole (biases, norms, full differences).
        rotations: Module -> angles its weight is rotated by (LoRaD).
    """

    tensors: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Angles] = field(default_factory=dict)

    @property
    def is_dora(self) -> bool:
        """Whether any module has a magnitude vector."""
        return any(MAGNITUDE in name for name in self.tensors)


def plain_model(component: object) -> nn.Module | None:
    """The model behind a component, `torch.compile` taken off; None for what is no model."""
    if not isinstance(component, nn.Module):
        return None
    return cast(Any, component)._orig_mod if is_compiled_module(component) else component


def lora_layers(component: object) -> dict[str, LoraLayer]:
    """Module name -> LoRA layer, whoever put it there."""
    model = plain_model(component)
    if model is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def layers_with(component: object, adapter: str) -> dict[str, LoraLayer]:
    """Module name -> LoRA layer that carries this adapter."""
    return {name: layer for name, layer in lora_layers(component).items() if adapter in layer.r}


def active_adapters(layer: LoraLayer) -> list[str]:
    """Names of the adapters a layer applies."""
    return list(cast(Any, layer).active_adapters)


def activate(layer: LoraLayer, adapters: Sequence[str]) -> None:
    """Apply exactly these of the layer's adapters; nothing becomes trainable."""
    layer.set_adapter([name for name in adapters if name in layer.r], inference_mode=True)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a model's weights, as if no LoRA and no quantisation were there."""
    shapes = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(module, LoraLayer) or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):  # 4-bit weights are stored packed, in another shape
            shapes[f"{plain}.weight"] = (module.out_features, module.in_features)
            if module.bias is not None:
                shapes[f"{plain}.bias"] = tuple(module.bias.shape)
        else:
            for kind, weight in module.named_parameters(recurse=False):
                shapes[f"{plain}.{kind}" if plain else kind] = tuple(weight.shape)
    return shapes


def put_on(model: nn.Module, adapter: str, weights: LoraWeights) -> None:
    """Add an adapter to a model, switched on beside what was on before.

    Raises:
        ValueError, RuntimeError, KeyError: peft could not do it; call `take_off` then.
    """
    before = {name: active_adapters(layer) for name, layer in lora_layers(model).items()}
    rank, alpha = _most_common(weights.ranks), _most_common(weights.alphas)
    config = LoraConfig(
        r=int(rank),
        lora_alpha=cast(Any, alpha),
        target_modules=list(weights.ranks),
        # "^" binds a pattern to the whole name; peft tries every pattern on every module, so only
        # what differs is listed.
        rank_pattern={f"^{name}": r for name, r in weights.ranks.items() if r != rank},
        alpha_pattern=cast(
            Any, {f"^{name}": a for name, a in weights.alphas.items() if a != alpha}
        ),
        use_dora=weights.is_dora,
        inference_mode=True,
    )
    tensors = dict(weights.tensors)
    with warnings.catch_warnings():  # peft asks to take care with several adapters; we do
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, model, adapter, low_cpu_mem_usage=True, state_dict=tensors)
        set_peft_model_state_dict(model, tensors, adapter, low_cpu_mem_usage=True)
    cast(Any, model)._hf_peft_config_loaded = True  # set_adapters looks at it
    for name, layer in lora_layers(model).items():
        activate(layer, [*before.get(name, []), adapter])
        for matrix in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            matrix.requires_grad_(False)


def take_off(model: nn.Module, adapter: str) -> None:
    """Remove an adapter; layers that no other adapter needs become plain ones again."""
    for name, layer in layers_with(model, adapter).items():
        activate(layer, [other for other in active_adapters(layer) if other != adapter])
        with warnings.catch_warnings():  # peft would turn another adapter on; that is undone below
            warnings.simplefilter("ignore", UserWarning)
            active = active_adapters(layer)
            layer.delete_adapter(adapter)
        activate(layer, active)
        if not layer.r:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    configs = cast(Any, model).__dict__.get("peft_config", {})
    configs.pop(adapter, None)
    if not lora_layers(model) or not configs:
        forget_peft(model)


def merge_all(model: nn.Module) -> None:
    """Merge the active adapters of a model into its weights and remove all LoRA layers.

    Raises:
        ValueError: Merged weights are not finite.
    """
    for layer in lora_layers(model).values():
        cast(Any, layer).merge(safe_merge=True)
    forget_peft(model)


def forget_peft(model: nn.Module) -> None:
    """Plain layers again, and nothing that says there ever were others."""
    recurse_remove_peft_layers(model)
    if "peft_config" in model.__dict__:
        del cast(Any, model).peft_config
    if "_hf_peft_config_loaded" in model.__dict__:
        cast(Any, model)._hf_peft_config_loaded = False


def _most_common(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


@contextmanager
def offloading_paused(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, weights are where they can be changed; offloading is put back afterwards."""
    to_cpu, sequential, grouped = LoraBaseMixin._optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        where: Any = getattr(pipe, "_offload_device", None)  # None lets diffusers choose
        if to_cpu:
            pipe.enable_model_cpu_offload(device=where)
        elif sequential:
            pipe.enable_sequential_cpu_offload(device=where)
        elif grouped:
            for component in pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)
