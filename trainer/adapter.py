"""The run's product: the averaged adapter with its recipe, as one diffusers-loadable file."""

from pathlib import Path

import fewstep
from fewstep.adapters import save_adapter
from fewstep.recipe import FewStepRecipe, Grid, Lora, Provenance, Sampler
from fewstep.trainer.backbone import Backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.lora import LoraBank
from fewstep.trainer.roles import Role
from fewstep.trainer.rollout import StudentPath


def build_recipe(
    config: TrainConfig,
    backbone: Backbone,
    path: StudentPath,
    scores: dict[str, float],
    step: int,
) -> FewStepRecipe:
    """The recipe of what was trained: its grid, its steps, no guidance."""
    levels = path.levels
    grid = Grid(
        timesteps=tuple(level.timestep for level in levels[:-1]),
        sigmas=tuple(level.sigma for level in levels),
    )
    return FewStepRecipe(
        base=backbone.base(config.model),
        grids=(grid,),
        default_steps=grid.num_steps,
        sampler=Sampler(stochasticity=path.stochasticity),
        lora=Lora(alpha="baked"),
        provenance=Provenance(
            objective=objective_of(config, step),
            teacher=f"{config.model}, guidance {config.guidance_scale:g}",
            config_hash=config.digest(),
            scores=scores or None,
            created_by=f"fewstep {fewstep.__version__}",
        ),
    )


def objective_of(config: TrainConfig, step: int) -> str:
    """What shaped the weights after `step` optimizer steps, in words."""
    warm = min(step, config.warm_start.num_steps)
    counts = {"trajectory warm start": warm, "dmd2": step - warm}
    return ", then ".join(f"{name} {count} steps" for name, count in counts.items() if count)


def write_adapter(
    file: Path,
    config: TrainConfig,
    backbone: Backbone,
    bank: LoraBank,
    path: StudentPath,
    scores: dict[str, float],
    step: int,
) -> FewStepRecipe:
    """Save the averaged adapter after `step` steps; returns the recipe inside the file."""
    recipe = build_recipe(config, backbone, path, scores, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(
        file,
        bank.tensors(Role.AVERAGE),
        recipe=recipe,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        component=backbone.component,
        title=f"{config.out.name}: {config.model} in {path.num_steps} steps",
        description=f"Distilled with fewstep: {objective_of(config, step)}.",
    )
    return recipe
