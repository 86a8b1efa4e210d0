"""The run's product: the averaged student with its recipe, in the form its parameters need."""

from pathlib import Path

import fewstep
from fewstep.adapters import save_adapter
from fewstep.recipe import FewStepRecipe, Grid, Lora, Provenance, Sampler
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.context import Setting
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role
from fewstep.trainer.run_folder import RunFolder


def product_file(config: TrainConfig) -> Path:
    """Where a run's adapter is written."""
    return config.out / "adapter" / f"{config.out.name}.safetensors"


def build_recipe(frame: Frame, scores: dict[str, float], step: int) -> FewStepRecipe:
    """The recipe of what was trained: its grids, its steps, no guidance."""
    config, backbone, main = frame.config, frame.backbone, frame.path
    return FewStepRecipe(
        base=backbone.base(config.model),
        grids=tuple(grid_of(path) for path in frame.paths),
        default_steps=main.num_steps,
        sampler=Sampler(stochasticity=main.stochasticity),
        guidance=backbone.guidance,
        lora=Lora(alpha="baked"),
        provenance=Provenance(
            objective=f"{config.method.facts.name}, {step} steps",
            teacher=f"{config.model}, guidance {config.guidance_scale:g}",
            config_hash=config.digest(),
            scores=scores or None,
            created_by=f"fewstep {fewstep.__version__}",
        ),
    )


def grid_of(path: StudentPath) -> Grid:
    """A path as the recipe stores it."""
    return Grid(
        timesteps=tuple(level.timestep for level in path.levels[:-1]),
        sigmas=tuple(level.sigma for level in path.levels),
        sizes=path.sizes,
    )


def write_product(
    folder: RunFolder, setting: Setting, frame: Frame, scores: dict[str, float], step: int
) -> Path:
    """Save the averaged student after `step` steps; returns the file."""
    config = frame.config
    file = folder.root / "adapter" / f"{config.out.name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    steps = ", ".join(str(path.num_steps) for path in frame.paths)
    return save_adapter(
        file,
        setting.cast.tensors(Role.AVERAGE),
        recipe=build_recipe(frame, scores, step),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        component=frame.backbone.component,
        title=f"{config.out.name}: {config.model} in {steps} steps",
        description=f"Distilled with fewstep: {config.method.facts.name}, {step} steps.",
    )
