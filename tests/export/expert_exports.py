"""The digits SD3 pipeline with two random experts on its one network, exported once for a run."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from fewstep.adapters import save_adapter
from fewstep.digits.weights import teacher_folder
from fewstep.export.fused.fusing import add_fused
from fewstep.export.merging import load_merged
from fewstep.export.onnx_folder import write_folder, write_manifest
from fewstep.loading import load_stock_pipeline
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import SIDECAR_NAME, Expert, FewStepRecipe
from fewstep.runtime.manifest import read_manifest
from tests.digits_exports import Exported, digits_recipe

LAYERS = {"high_noise": ("to_q", "to_v"), "low_noise": ("to_q", "to_k")}
"""Expert -> the layers it changes: one kind in common, one of its own."""
BOUNDARY = 0.6


def expert_recipe(stochasticity: float = 0.0) -> FewStepRecipe:
    """Half of the steps are each expert's."""
    recipe = digits_recipe("sd3", stochasticity)
    experts = (
        Expert(adapter="high_noise", sigma_high=1.0, sigma_low=BOUNDARY),
        Expert(adapter="low_noise", sigma_high=BOUNDARY, sigma_low=0.0),
    )
    grids = tuple(
        replace(grid, experts=tuple(int(sigma < BOUNDARY) for sigma in grid.sigmas[:-1]))
        for grid in recipe.grids
    )
    return replace(recipe, experts=experts, grids=grids)


@cache
def expert_adapters() -> Path:
    """A folder with a file per expert."""
    folder = Path(mkdtemp(prefix="fewstep-test-"))
    model = load_stock_pipeline(teacher_folder("sd3")).components["transformer"]
    for seed, (name, layers) in enumerate(LAYERS.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, module in model.named_modules():
            if path.endswith(layers):
                down = torch.randn(2, module.in_features, generator=generator)
                up = torch.randn(module.out_features, 2, generator=generator)
                tensors[f"{path}.lora_A.weight"] = 0.1 * down
                tensors[f"{path}.lora_B.weight"] = up
        save_adapter(
            folder / f"{name}_model.safetensors",
            tensors,
            recipe=expert_recipe(),
            rank=2,
            alpha=1.0,
            title="expert",
            component="transformer",
            metadata={"fewstep.phase": name},
        )
    return folder


@cache
def exported_experts(stochasticity: float) -> Exported:
    """The folder, fused graph and all, without the gate; shared by tests that only read it."""
    recipe, folder = expert_recipe(stochasticity), Path(mkdtemp(prefix="fewstep-test-"))
    shutil.copytree(_components(), folder, dirs_exist_ok=True)
    (folder / SIDECAR_NAME).write_text(recipe.to_json(), encoding="utf-8")
    write_manifest(folder, add_fused(folder, read_manifest(folder), recipe, None))
    pipe: Any = FewStepPipeline.from_pretrained(
        teacher_folder("sd3"), adapter=expert_adapters(), recipe=recipe
    )
    pipe.set_progress_bar_config(disable=True)
    return Exported(folder, expert_adapters(), pipe)


@cache
def _components() -> Path:
    folder = Path(mkdtemp(prefix="fewstep-test-"))
    merged = load_merged(teacher_folder("sd3"), expert_adapters(), None)
    write_folder(merged, folder, opset=18, progress=lambda _: None)
    return folder
