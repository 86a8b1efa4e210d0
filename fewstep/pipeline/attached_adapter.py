"""LoRA files on a pipeline's denoiser: attach with proof that all of it arrived, fuse, remove."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from fewstep.adapters import AdapterHeader, Coverage, check_coverage, lora_modules
from fewstep.adapters.names import parse_name
from fewstep.errors import AdapterError, PipelineError

ADAPTER_NAME = "fewstep"
DENOISERS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True, slots=True)
class AttachedAdapter:
    """An adapter on a pipeline.

    Attributes:
        path: The file.
        scale: What its alpha / rank is multiplied with.
        is_fused: Whether its weights are merged into the base; it cannot be taken off then.
    """

    path: Path
    scale: float
    is_fused: bool = False


def attach(pipe: DiffusionPipeline, header: AdapterHeader, scale: float) -> AttachedAdapter:
    """Load an adapter, checked before and after.

    diffusers loads what it recognises and says little of the rest; a half-loaded adapter gives a
    blurred picture, so here it is an error and the pipeline is left as it was.

    Raises:
        AdapterError: The file does not fit, or not all of it was loaded.
        PipelineError: An adapter of ours is already there.
    """
    name, model = main_denoiser(pipe)
    if adapted_modules(model):
        raise PipelineError(f"an adapter {ADAPTER_NAME!r} is already attached; unwrap() it first")
    _check_components(pipe, header, name)
    coverage = check_coverage(header, weight_shapes(model))
    already_active = _active_adapters(pipe)
    wanted = set(coverage.ranks)
    try:
        if isinstance(pipe, LoraBaseMixin):
            _load(pipe, header.path)
        else:
            _inject(model, header, coverage)
    except Exception as error:
        detach(pipe)
        raise AdapterError(f"{header.path}: diffusers could not load it ({error})") from error
    loaded = adapted_modules(model)
    text_modules = sum(ADAPTER_NAME in layer.r for layer in _all_lora_layers(pipe)) - len(loaded)
    if loaded != wanted or text_modules != coverage.text_encoder_modules:
        detach(pipe)
        difference = min(loaded ^ wanted, default="a text encoder's")
        raise AdapterError(
            f"{header.path}: {len(loaded) + text_modules} of "
            f"{len(wanted) + coverage.text_encoder_modules} LoRA modules were loaded (first "
            f"difference: {difference}); save the file with diffusers' names"
        )
    for layer in _all_lora_layers(pipe):
        # Loading made ours the only active one; a style LoRA of the user's stays on beside it.
        layer.set_adapter([n for n in (*already_active, ADAPTER_NAME) if n in layer.r])
        if ADAPTER_NAME in layer.r:
            layer.set_scale(ADAPTER_NAME, scale)
    return AttachedAdapter(header.path, scale)


def fuse(pipe: DiffusionPipeline, adapter: AttachedAdapter) -> AttachedAdapter:
    """Merge the active LoRAs into the weights, in every component that has one.

    A plain `pipe.fuse_lora()` knows one component per pipeline class: on Wan 2.2 it would merge the
    high-noise expert, and `unload_lora_weights` would then drop the other's LoRA.
    """
    if isinstance(pipe, LoraBaseMixin):
        pipe.fuse_lora(components=adapted_components(pipe))
        cast(Any, pipe).unload_lora_weights()
    else:
        _, model = main_denoiser(pipe)
        for layer in _lora_layers(model).values():
            layer.merge()
        recurse_remove_peft_layers(model)
    return replace(adapter, is_fused=True)


def detach(pipe: DiffusionPipeline) -> None:
    """Remove our adapter; layers go back to plain ones where no other adapter needs them."""
    names = {name for layer in _all_lora_layers(pipe) for name in layer.r}
    if ADAPTER_NAME not in names:
        return
    if isinstance(pipe, LoraBaseMixin) and names != {ADAPTER_NAME}:
        pipe.delete_adapters(ADAPTER_NAME)
    elif isinstance(pipe, LoraBaseMixin):
        cast(Any, pipe).unload_lora_weights()
    else:
        recurse_remove_peft_layers(main_denoiser(pipe)[1])


def adapted_components(pipe: DiffusionPipeline) -> list[str]:
    """Components whose layers are wrapped by LoRA, ours or anyone's."""
    return [name for name, component in pipe.components.items() if _lora_layers(component)]


def adapted_modules(model: nn.Module) -> set[str]:
    """Names of the modules that carry our adapter."""
    return {name for name, layer in _lora_layers(model).items() if ADAPTER_NAME in layer.r}


def main_denoiser(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Name and model of the component that few-step adapters change."""
    for name in DENOISERS:
        model = pipe.components.get(name)
        if isinstance(model, nn.Module):
            return name, model
    raise PipelineError(
        f"{type(pipe).__name__} has no denoiser named {', '.join(DENOISERS)}; "
        "pass the recipe alone, without an adapter"
    )


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a model's weights, as if no LoRA and no quantisation were there."""
    shapes = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(module, LoraLayer) or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):  # 4-bit weights are stored packed, in another shape
            shapes[f"{plain}.weight"] = (module.out_features, module.in_features)
        else:
            for kind, weight in module.named_parameters(recurse=False):
                shapes[f"{plain}.{kind}"] = tuple(weight.shape)
    return shapes


def _load(pipe: DiffusionPipeline, path: Path) -> None:
    # diffusers warns of every text encoder the file says nothing about; `attach` counts instead.
    log = logging.getLogger("diffusers.loaders")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        cast(Any, pipe).load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=ADAPTER_NAME
        )
    finally:
        log.setLevel(level)


def _inject(model: nn.Module, file: AdapterHeader, coverage: Coverage) -> None:
    """Load onto a model whose pipeline has no LoRA loader of its own (PixArt, PRX)."""
    kohya = {name.replace(".", "_"): name for name in coverage.ranks}
    weights = {}
    for full_name, weight in safetensors.torch.load_file(file.path).items():
        name = parse_name(full_name)
        if name.part in ("down", "up") and not name.is_text_encoder:
            matrix = "lora_A" if name.part == "down" else "lora_B"
            weights[f"{kohya.get(name.module, name.module)}.{matrix}.weight"] = weight
    config = LoraConfig(
        target_modules=list(coverage.ranks),
        rank_pattern={f"^{name}": rank for name, rank in coverage.ranks.items()},
        alpha_pattern={f"^{name}": alpha for name, alpha in coverage.alphas.items()},
    )
    inject_adapter_in_model(config, model, ADAPTER_NAME)
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)


def _check_components(pipe: DiffusionPipeline, header: AdapterHeader, denoiser: str) -> None:
    named = {module.name for module in lora_modules(header)}
    for name in sorted({n.component for n in named if n.is_text_encoder}):
        if pipe.components.get(name) is None:
            raise AdapterError(
                f"{header.path}: has LoRA modules for {name}, which this pipeline was loaded "
                f"without; load the base with its {name}"
            )
    others = sorted(({n.component for n in named} & set(DENOISERS)) - {denoiser})
    if others:
        raise AdapterError(
            f"{header.path}: has LoRA modules for {others[0]}, but this pipeline's few-step "
            f"adapter goes on {denoiser}; use a file made for {denoiser}"
        )


def _lora_layers(component: object) -> dict[str, LoraLayer]:
    if not isinstance(component, nn.Module):
        return {}
    return {name: m for name, m in component.named_modules() if isinstance(m, LoraLayer)}


def _all_lora_layers(pipe: DiffusionPipeline) -> Iterator[LoraLayer]:
    for component in pipe.components.values():
        yield from _lora_layers(component).values()


def _active_adapters(pipe: DiffusionPipeline) -> tuple[str, ...]:
    active = (name for layer in _all_lora_layers(pipe) for name in cast(Any, layer).active_adapters)
    return tuple(dict.fromkeys(active))
