"""Adapter files for tiny pipelines."""

from pathlib import Path

import torch

from fewstep.adapters import save_adapter
from fewstep.recipe import FewStepRecipe
from tests.tiny.family import TinyFamily


def lora_file(
    family: TinyFamily,
    path: Path,
    *,
    recipe: FewStepRecipe | None = None,
    strength: float = 0.5,
    width: int | None = None,
) -> Path:
    """An adapter of rank 2 on every to_q and to_v of a family's denoiser."""
    model = family.build().components[family.denoisers[0]]
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("to_q", "to_v")):
            inner = width or module.in_features
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, inner, generator=generator)
            tensors[f"{name}.lora_B.weight"] = strength * torch.randn(
                module.out_features, 2, generator=generator
            )
    return save_adapter(
        path,
        tensors,
        recipe=recipe or family.recipe(),
        rank=2,
        alpha=2.0,
        title="test",
        component="unet" if family.denoisers[0] == "unet" else "transformer",
    )
