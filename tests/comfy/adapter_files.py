"""Adapter files for the tiny models, in every spelling that is in the wild."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fewstep.adapters import read_header
from fewstep.adapters.conversion import convert_to_diffusers
from fewstep.adapters.conversion.file_writing import write_safetensors
from fewstep.adapters.conversion.writing import in_format
from fewstep.recipe import METADATA_KEY, FewStepRecipe
from tests.comfy.tiny_models import TinyModel
from tests.conversion_families import ConversionFamily

SPELLINGS = ("diffusers", "peft", "bare", "kohya", "comfyui")


@functools.cache
def family_of(model: TinyModel) -> ConversionFamily:
    """The tiny model as the conversion tests know families."""
    return ConversionFamily(model.family, model.network, dict, "", component=model.component)


def adapter_file(
    path: Path,
    model: TinyModel,
    recipe: FewStepRecipe | None,
    *,
    spelling: str = "diffusers",
    seed: int = 0,
    scale: float = 0.5,
    layers: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
    component: str | None = None,
) -> Path:
    """A LoRA on every layer (or those whose names end so), alpha / rank = scale.

    Args:
        path: The new file.
        model: Which model.
        recipe: Written into it; None leaves it out.
        spelling: One of `SPELLINGS`.
        seed: Of its values.
        scale: alpha / rank; ranks differ from layer to layer.
        layers: Endings of the layers that get one; () is all.
        metadata: More.
        component: What diffusers names begin with, if not the model's own.
    """
    tensors, alphas = family_of(model).lora(seed=seed, scale=scale)
    if layers:
        alphas = {name: alpha for name, alpha in alphas.items() if name.endswith(layers)}
        tensors = {n: v for n, v in tensors.items() if n.rpartition(".lora_")[0] in alphas}
    said = dict(metadata or {})
    if recipe is not None:
        said[METADATA_KEY] = recipe.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, component or model.component, tensors, alphas, said, spelling)
    if spelling in ("kohya", "comfyui"):
        _rewrite(path, model, spelling)
    return path


def _write(
    path: Path,
    component: str,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
    spelling: str,
) -> None:
    prefix = {"peft": "base_model.model.", "bare": ""}.get(spelling, f"{component}.")
    start = f"{component}." if prefix == f"{component}." else ""
    ranks = {name: len(tensors[f"{name}.lora_A.weight"]) for name in alphas}
    config: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": list(alphas),
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items()},
    }
    text = json.dumps({start + key: value for key, value in config.items()})
    save_file(
        {prefix + name: values.contiguous() for name, values in tensors.items()},
        path,
        metadata={"format": "pt", "lora_adapter_metadata": text, **metadata},
    )


def _rewrite(path: Path, model: TinyModel, spelling: Any) -> None:
    shapes = family_of(model).shapes()
    adapter = convert_to_diffusers(
        read_header(path), shapes, component=model.component, family=model.family
    )
    file = in_format(adapter, shapes, spelling)
    write_safetensors(path, file.tensors, file.metadata)
