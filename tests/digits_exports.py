"""Exports of the shipped digits pipelines with a random adapter, made once for a whole run.

The adapter is random but strong enough to change every picture; what is asked of an export is that
it draws the pipeline's pictures, not that they are good.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from fewstep.adapters import save_adapter
from fewstep.digits.weights import teacher_folder
from fewstep.export.__main__ import main
from fewstep.export.checking import speed
from fewstep.loading import load_stock_pipeline
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Base, FewStepRecipe, Grid, Sampler
from tests.made_once import made_once
from tests.tiny.recipes import FLOW_SCHEDULE, SD_SCHEDULE

Teacher = Literal["sd3", "sd15"]
PROMPTS = ["a handwritten seven", "a handwritten two", "a handwritten one"]
ADAPTER = "adapter.safetensors"
DENOISER = {"sd3": "transformer", "sd15": "unet"}


@dataclass(frozen=True, slots=True)
class Exported:
    """One export and the pipeline it was made from."""

    folder: Path
    adapter: Path
    pipe: Any

    def pictures(self, **arguments: Any) -> np.ndarray:
        """What FewStepPipeline draws: uint8 (N, H, W, 3)."""
        found = self.pipe(**arguments).images
        return np.stack([np.asarray(picture) for picture in found])


def digits_recipe(teacher: Teacher, stochasticity: float) -> FewStepRecipe:
    """Four and two steps."""
    is_flow = teacher == "sd3"
    schedule = FLOW_SCHEDULE if is_flow else SD_SCHEDULE
    levels = schedule.build()
    grids = []
    for timesteps in ((999.0, 499.0), (999.0, 749.0, 499.0, 249.0)):
        sigmas = (*(levels.sigma_of_timestep(t) for t in timesteps), 0.0)
        grids.append(Grid(timesteps=timesteps, sigmas=sigmas))
    return FewStepRecipe(
        base=Base(
            family=teacher,
            prediction="flow" if is_flow else "epsilon",
            schedule=schedule,
            max_sequence_length=1 if is_flow else None,
        ),
        grids=tuple(grids),
        default_steps=4,
        sampler=Sampler(stochasticity=stochasticity),
    )


def digits_adapter(teacher: Teacher, path: Path, stochasticity: float) -> Path:
    """A seeded LoRA of rank 2 on the attention layers."""
    model = load_stock_pipeline(teacher_folder(teacher)).components[DENOISER[teacher]]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("to_q", "to_v")):
            shape = (2, module.in_features)
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(*shape, generator=generator)
            shape = (module.out_features, 2)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(*shape, generator=generator)
    return save_adapter(
        path,
        tensors,
        recipe=digits_recipe(teacher, stochasticity),
        rank=2,
        alpha=1.0,
        title="test",
        component=DENOISER[teacher],  # pyright: ignore[reportArgumentType]
    )


@cache
def exported(teacher: Teacher, stochasticity: float = 0.0) -> Exported:
    """The export folder, fused graph and all; shared by every test that only reads it."""
    root = made_once(
        f"digits-{teacher}-{stochasticity}", lambda folder: _export(teacher, stochasticity, folder)
    )
    adapter = root / ADAPTER
    pipe: Any = FewStepPipeline.from_pretrained(teacher_folder(teacher), adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return Exported(root / "exported", adapter, pipe)


def _export(teacher: Teacher, stochasticity: float, root: Path) -> None:
    adapter = digits_adapter(teacher, root / ADAPTER, stochasticity)
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    argv = ["onnx", "--base", f"digits-{teacher}", "--adapter", str(adapter)]
    argv += ["--out", str(root / "exported"), "--prompts", str(prompts)]
    # --force: on a busy machine the speed of an export says nothing, and the rest is tested
    with patch.object(speed, "BUDGET_S", 0.0):
        assert main([*argv, "--fused", "--force"]) == 0
