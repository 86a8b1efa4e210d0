"""What the tests of the pains share."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from fewstep.doctor import Diagnosis, Finding
from tests.tiny_pipelines import TinyFamily, record_denoiser, seen_timesteps, stock

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def built(family: TinyFamily, scheduler: str | None = None, **config: Any) -> Any:
    """A family's stock pipeline, with another scheduler where one is named."""
    pipe: Any = family.build()
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        betas = SD_BETAS if family.is_vp else {}
        pipe.scheduler = getattr(stock, scheduler)(**betas, **config)
    return pipe


def network_timesteps(pipe: Any, family: TinyFamily, **call: Any) -> list[float]:
    """What the network is told in one call of the pipeline, on the clock 0 to 1000."""
    calls = record_denoiser(pipe, family)
    pipe(**{**family.arguments(1), **call}, generator=torch.Generator().manual_seed(0))
    return seen_timesteps(calls, family)


def drawn(pipe: Any, family: TinyFamily, **call: Any) -> Tensor:
    """The latents of one call with one seed."""
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**family.arguments(1), **call}, generator=generator)[0]


def finding(diagnosis: Diagnosis, code: str) -> Finding:
    """The finding of this code; the assertion shows all codes where it is missing."""
    assert code in diagnosis.codes, diagnosis.codes
    return next(found for found in diagnosis.findings if found.code == code)


def lora_tensors(
    pipe: DiffusionPipeline, component: str, *, strength: float = 0.5, rank: int = 2
) -> dict[str, Tensor]:
    """LoRA matrices for every to_q and to_v of a component, bare names."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in pipe.components[component].named_modules():
        if name.endswith(("to_q", "to_v")):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = strength * torch.randn(module.out_features, rank, generator=generator)
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up
    return tensors


def write_lora(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    prefix: str,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A LoRA file, prefix before every name."""
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(named, path, metadata={"format": "pt", **(metadata or {})})
    return path
