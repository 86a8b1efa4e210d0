"""Reading a pipeline's parts into the plain values the checks look at."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from fewstep.doctor.probe import DENOISERS
from fewstep.doctor.subject import AppliedLora, GuidanceFacts, Network, SchedulerFacts, Vae
from fewstep.doctor.zero_data import prediction_of
from fewstep.errors import PipelineError
from fewstep.pipeline.guidance import rule_of, translate_guidance
from fewstep.pipeline.lora_layers import active_adapters, lora_layers
from fewstep.recipe import FewStepRecipe

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SDXL_SCALING = 0.13025
"""Scaling factor of the VAE whose float16 activations overflow."""


def networks_of(pipe: DiffusionPipeline) -> tuple[Network, ...]:
    """The denoisers."""
    found = ((name, pipe.components.get(name)) for name in DENOISERS)
    return tuple(_network(name, model) for name, model in found if isinstance(model, nn.Module))


def vae_of(pipe: DiffusionPipeline) -> Vae | None:
    """The VAE; SDXL's is tried in float16, which only some copies of it survive."""
    part = pipe.components.get("vae")
    if not isinstance(part, nn.Module):
        return None
    vae: Any = part
    dtype = next((p.dtype for p in vae.parameters()), torch.float32)
    config = vae.config
    upcast = bool(config.get("force_upcast", False))
    tried = None
    if dtype == torch.float16 and not upcast and config.get("scaling_factor") == SDXL_SCALING:
        tried = _overflows(vae, int(config["latent_channels"]))
    return Vae(_dtype_name(dtype), upcast, tried)


def scheduler_facts(scheduler: Any) -> SchedulerFacts:
    """A scheduler, stock or not."""
    prediction = prediction_of(scheduler)
    kind = {"flow_prediction": "flow", "trigflow": "trigflow"}.get(prediction, "vp")
    return SchedulerFacts(
        class_name=type(scheduler).__name__,
        is_of_diffusers=type(scheduler).__module__.startswith("diffusers."),
        config=dict(scheduler.config),
        kind=kind,
    )


def guidance_facts(
    pipeline_class: type, arguments: Mapping[str, Any], recipe: FewStepRecipe | None
) -> GuidanceFacts:
    """How a call guides: the arguments it is given, else the defaults of the class."""
    parameters = inspect.signature(cast(Any, pipeline_class).__call__).parameters
    rule, _ = rule_of(pipeline_class.__name__, set(parameters))
    values = {}
    for name in (rule.cfg, rule.embedded):
        if name is not None and name in parameters:
            value = arguments.get(name)
            value = parameters[name].default if value is None else value
            if isinstance(value, int | float):
                values[name] = float(value)
    wanted = {}
    if recipe is not None:
        try:
            wanted = translate_guidance(pipeline_class, recipe.guidance)
        except PipelineError:
            pass  # told as the reason why FewStepPipeline cannot serve it
    negative = (arguments.get(name) for name in ("negative_prompt", "negative_prompt_embeds"))
    return GuidanceFacts(
        argument=rule.cfg,
        off=rule.off,
        values=values,
        given=tuple(name for name in values if arguments.get(name) is not None),
        wanted=wanted,
        needs_negative=rule.needs_negative,
        has_negative=any(_is_something(value) for value in negative),
    )


def fused_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """LoRAs that diffusers remembers having merged."""
    return tuple(sorted(pipe.fused_loras)) if isinstance(pipe, LoraBaseMixin) else ()


def _network(component: str, model: nn.Module) -> Network:
    weights = [p.dtype for name, p in model.named_parameters() if ".lora_" not in name]
    plain = [dtype for dtype in weights if dtype in PLAIN]
    return Network(
        component=component,
        dtype=_dtype_name(max(plain, key=plain.count)) if plain else "none",
        quantised=_quantised(model, weights),
        is_compiled=_is_compiled(model),
        loras=tuple(_loras(model)),
    )


def _is_something(negative: Any) -> bool:
    if isinstance(negative, str):
        return bool(negative.strip())
    if isinstance(negative, list):
        return any(_is_something(one) for one in negative)
    return negative is not None


def _is_compiled(model: nn.Module) -> bool:
    # `torch.compile(model)` wraps; `model.compile()` and compile_repeated_blocks leave a call
    return is_compiled_module(model) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )


def _quantised(model: nn.Module, weights: list[torch.dtype]) -> str | None:
    method = getattr(model, "quantization_method", None)  # set by diffusers on quantised models
    if method is not None:
        return str(getattr(method, "value", method))
    odd = [dtype for dtype in weights if dtype not in PLAIN]
    return _dtype_name(max(odd, key=odd.count)) if odd else None


def _loras(model: nn.Module) -> Iterator[AppliedLora]:
    layers: list[Any] = list(lora_layers(model).values())
    for name in sorted({name for layer in layers for name in layer.r}):
        mine = [layer for layer in layers if name in layer.r]
        yield AppliedLora(
            name=name,
            modules=len(mine),
            scales=_distinct(layer.scaling[name] for layer in mine),
            weights=_distinct(layer.scaling[name] / _own_scale(layer, name) for layer in mine),
            dtype=_dtype_name(mine[0].lora_A[name].weight.dtype),
            is_active=any(_applies(layer, name) for layer in mine),
            is_merged=any(name in layer.merged_adapters for layer in mine),
        )


def _applies(layer: Any, name: str) -> bool:
    return name in active_adapters(layer) and not layer.disable_adapters


def _own_scale(layer: Any, name: str) -> float:
    rank = layer.r[name]
    return layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank)


def _distinct(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted({round(float(value), 6) for value in values}))


@torch.no_grad()
def _overflows(vae: Any, channels: int) -> bool:
    """Whether decoding noise overflows; small, because it is the weights that decide."""
    generator = torch.Generator("cpu").manual_seed(0)
    weight = next(vae.parameters())
    latents = torch.randn(1, channels, 16, 16, generator=generator).to(weight) / SDXL_SCALING
    return not bool(torch.isfinite(vae.decode(latents, return_dict=False)[0]).all())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
