"""What stock diffusers makes of a LoRA file: loaded for real, counted, and taken off again."""

import logging
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin

from fewstep.adapters import AdapterHeader
from fewstep.doctor.subject import StockLoad
from fewstep.pipeline.attached_adapter import detach
from fewstep.pipeline.lora_layers import active_adapters, layers_with, lora_layers

NAME = "fewstep_doctor"


def try_stock_load(pipe: DiffusionPipeline, header: AdapterHeader) -> StockLoad | None:
    """Load a file with `load_lora_weights` and count the layers that got it.

    Args:
        pipe: Put back as it was, other adapters included.
        header: A safetensors file.

    Returns:
        None where the class has no LoRA loader, or the file is not safetensors.
    """
    if not isinstance(pipe, LoraBaseMixin) or header.path.suffix != ".safetensors":
        return None
    active = _active(pipe)
    loading = logging.getLogger("diffusers")
    level = loading.level
    loading.setLevel(logging.CRITICAL)  # the only sign that nothing was loaded is a log line
    try:
        cast(Any, pipe).load_lora_weights(
            str(header.path.parent), weight_name=header.path.name, adapter_name=NAME
        )
        loaded = sum(len(layers_with(part, NAME)) for part in pipe.components.values())
        return StockLoad(loaded)
    except Exception as error:  # every format fails in its own way
        return StockLoad(0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        loading.setLevel(level)
        detach(pipe, [NAME])
        for layer, names in active:
            layer.set_adapter(names)


def _active(pipe: DiffusionPipeline) -> list[tuple[Any, list[str]]]:
    layers = (layer for part in pipe.components.values() for layer in lora_layers(part).values())
    return [(layer, active_adapters(layer)) for layer in layers]
