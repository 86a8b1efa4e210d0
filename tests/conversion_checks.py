"""Measurements of converted files: in diffusers, in ComfyUI's key map, and there and back."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.adapters import read_header
from fewstep.adapters.conversion import ConvertedAdapter, convert_to_diffusers
from fewstep.adapters.conversion.file_writing import write_safetensors
from fewstep.adapters.conversion.name_index import weights_of
from fewstep.adapters.conversion.name_rules import native_modules
from fewstep.adapters.conversion.writing import Format, in_format
from tests.conversion_families import ConversionFamily, stock

Tensors = Mapping[str, Tensor]
SCRIPT = Path(__file__).parent / "comfyui_key_map.py"


def write_diffusers(
    path: Path,
    family: ConversionFamily,
    tensors: Tensors,
    alphas: Mapping[str, float],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A diffusers LoRA file as `save_lora_weights` writes it, alpha in the LoraConfig."""
    ranks = {module: tensors[f"{module}.lora_A.weight"].shape[0] for module in alphas}
    config = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": list(alphas),
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "alpha_pattern": {f"^{module}": alpha for module, alpha in alphas.items()},
    }
    prefixed = {f"{family.component}.{key}": value for key, value in config.items()}
    save_file(
        {f"{family.component}.{name}": values for name, values in tensors.items()},
        path,
        metadata={
            "format": "pt",
            "lora_adapter_metadata": json.dumps(prefixed),
            **(metadata or {}),
        },
    )
    return path


def read(path: Path, family: ConversionFamily) -> ConvertedAdapter:
    """The file on its tiny base."""
    return convert_to_diffusers(
        read_header(path), family.shapes(), component=family.component, family=family.name
    )


def write(path: Path, family: ConversionFamily, adapter: ConvertedAdapter, flavour: Format) -> Path:
    """An adapter in one flavour."""
    file = in_format(adapter, family.shapes(), flavour)
    write_safetensors(path, file.tensors, file.metadata)
    return path


def round_trip_error(family: ConversionFamily, folder: Path, flavour: Format) -> float:
    """Largest difference of a factor or an alpha after diffusers -> flavour -> diffusers."""
    tensors, alphas = family.lora()
    source = write_diffusers(folder / "source.safetensors", family, tensors, alphas)
    there = write(folder / "there.safetensors", family, read(source, family), flavour)
    back = write(folder / "back.safetensors", family, read(there, family), "diffusers")
    result = read(back, family)
    if result.tensors.keys() != tensors.keys() or result.alphas.keys() != alphas.keys():
        raise AssertionError(f"{family.name}: other modules came back")
    errors = [
        float((result.tensors[name] - values).abs().max()) for name, values in tensors.items()
    ]
    return max(*errors, *(abs(result.alphas[module] - alphas[module]) for module in alphas))


def merged(family: ConversionFamily, tensors: Tensors, alphas: Mapping[str, float]) -> nn.Module:
    """The tiny model with every delta added to its weight: what an adapter should do."""
    model = family.build().eval()
    for name, delta in deltas(tensors, alphas).items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data += delta.reshape(weight.shape)
    return model


def deltas(tensors: Tensors, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Module -> alpha / rank * up @ down, flattened to (out, in * kernel)."""
    found = {}
    for module, alpha in alphas.items():
        down, up = (tensors[f"{module}.{end}.weight"].flatten(1) for end in ("lora_A", "lora_B"))
        found[module] = up @ down * (alpha / down.shape[0])
    return found


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers tells of every file it converts, and of text encoders a file does not have."""
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def in_diffusers(path: Path, family: ConversionFamily) -> nn.Module:
    """The tiny model with the file loaded by diffusers' own loader for its pipeline class."""
    model = family.build().eval()
    pipeline = getattr(stock, family.pipeline)
    with quiet_diffusers():
        if issubclass(pipeline, LoraBaseMixin):
            missing = {name: None for name in components_of(pipeline) if name != family.component}
            pipe = pipeline(**missing, **{family.component: model})
            cast(Any, pipe).load_lora_weights(str(path.parent), weight_name=path.name)
        else:
            _inject(model, path, family)
    return model


def _inject(model: nn.Module, path: Path, family: ConversionFamily) -> None:
    """What a user of a model without a LoRA loader (PixArt) does: peft with the file's config."""
    header = read_header(path)
    prefix = f"{family.component}."
    config = json.loads(header.metadata["lora_adapter_metadata"])
    inject_adapter_in_model(
        LoraConfig(**{key.removeprefix(prefix): value for key, value in config.items()}), model
    )
    tensors = {name.removeprefix(prefix): values for name, values in load_file(path).items()}
    result = set_peft_model_state_dict(model, tensors)
    if result.unexpected_keys:
        raise AssertionError(f"peft does not know {result.unexpected_keys[0]}")


def components_of(pipeline: Any) -> list[str]:
    """Names of the modules a pipeline class takes, schedulers included."""
    return list(pipeline._get_signature_keys(pipeline)[0])


def adapted(model: nn.Module) -> set[str]:
    """Modules that carry a LoRA."""
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def comfyui_deltas(family: ConversionFamily, adapter: ConvertedAdapter) -> dict[str, Tensor]:
    """ComfyUI's weight name -> the delta that the adapter means there."""
    weights = weights_of(family.shapes())
    by_module = deltas(adapter.tensors, adapter.alphas)
    found = {}
    for native in native_modules(family.name, weights):
        if "upsamplers" in native.parts[0]:
            continue  # where one sits depends on the attention before it
        parts = [by_module[part] for part in native.parts if part in by_module]
        if len(parts) < len(native.parts):
            continue
        rows = torch.cat(parts)
        rows = torch.cat(rows.chunk(2)[::-1]) if native.swaps else rows
        shape = (sum(native.rows), *weights[native.parts[0]][1:])
        found[f"diffusion_model.{native.name}.weight"] = rows.reshape(shape).contiguous()
    for module, delta in by_module.items():
        if "upsamplers" in module:
            block = int(module.split(".")[1])
            has_attention = any(m.startswith(f"up_blocks.{block}.attentions") for m in by_module)
            name = f"output_blocks.{3 * block + 2}.{2 if has_attention else 1}.conv"
            found[f"diffusion_model.{name}.weight"] = delta.reshape(weights[module])
    return found


def run_comfyui(jobs: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What ComfyUI at COMFYUI_PATH says of each job (COMFYUI_PYTHON: its interpreter)."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(jobs)), encoding="utf-8")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    result = subprocess.run(
        [python, str(SCRIPT), os.environ["COMFYUI_PATH"], str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"ComfyUI failed:\n{result.stderr}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def comfyui_job(
    family: ConversionFamily, folder: Path, flavour: Format, name: str | None = None
) -> dict[str, Any]:
    """A converted file and the deltas ComfyUI should make of it."""
    tensors, alphas = family.lora()
    stem = f"{family.name}-{flavour}"
    source = write_diffusers(folder / f"{stem}-source.safetensors", family, tensors, alphas)
    adapter = read(source, family)
    file = write(folder / f"{stem}.safetensors", family, adapter, flavour)
    expected = folder / f"{stem}-expected.safetensors"
    save_file(comfyui_deltas(family, adapter), expected)
    return {
        "name": name or stem,
        "class": family.comfy_class,
        "config": dict(family.comfy_config),
        "file": str(file),
        "expected": str(expected),
    }
