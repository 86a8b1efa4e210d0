"""What is trained on a backbone's layers is what the stock pipeline draws with.

An adapter on every layer that a family names is saved as the trainer would, loaded into a fresh
pipeline, and drawn with; the same weights merged into the backbone's network must give the same
latents along the recipe's grid. For Wan 2.2 there is a file per network.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.adapters import save_adapter
from fewstep.adapters.expert_tags import PHASE_KEY
from fewstep.noise_schedule import Flow
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe, Grid
from fewstep.recipe_checks import expert_at
from fewstep.sampling import step
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.latents import unpack
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.roles import Role
from tests.trainer.backbone_cases import (
    BATCH,
    FAMILIES,
    HEIGHT_PX,
    SDXL_V,
    WIDTH_PX,
    Case,
    random_sample,
)

RANK = 2
TIMESTEPS = {True: (1000.0, 937.5, 2500.0 / 3.0, 625.0), False: (999.0, 749.0, 499.0, 249.0)}


def random_adapter(backbone: Backbone) -> dict[str, Tensor]:
    """Tensors on every target, under the names the trainer gives them."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for path, module in backbone.denoiser.named_modules():
        is_target = any(re.search(pattern, path) for pattern in backbone.lora_targets)
        if not is_target or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        out_size, *rest = module.weight.shape
        ones = [1] * (len(rest) - 1)
        tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, *rest, generator=generator)
        tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(
            out_size, RANK, *ones, generator=generator
        )
    return tensors


@torch.no_grad()
def merge(backbone: Backbone, tensors: dict[str, Tensor]) -> None:
    """weight + up @ down, by hand."""
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            layer: Any = backbone.denoiser.get_submodule(name.removesuffix(".lora_A.weight"))
            layer.weight += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)


def recipe_of(backbone: Backbone) -> FewStepRecipe:
    """Four steps on the backbone's schedule, given to its experts."""
    timesteps = TIMESTEPS[isinstance(backbone.schedule, Flow)]
    sigmas = tuple(backbone.schedule.sigma_of_timestep(t) for t in timesteps)
    experts = tuple(expert_at(backbone.experts, s) for s in sigmas) if backbone.experts else ()
    return FewStepRecipe(
        base=backbone.base("tiny"),
        grids=(Grid(timesteps=timesteps, sigmas=(*sigmas, 0.0), experts=experts),),
        default_steps=4,
        guidance=backbone.guidance,
        experts=backbone.experts,
    )


def save(backbone: Backbone, tensors: dict[str, Tensor], folder: Path) -> Path:
    """One file per component, tagged with the expert it is."""
    recipe, phases = recipe_of(backbone), {e.component: e.adapter for e in backbone.experts}
    for component, part in backbone.by_component(tensors).items():
        phase = phases.get(component)
        save_adapter(
            folder / f"{component}.safetensors",
            part,
            recipe=recipe,
            rank=RANK,
            alpha=float(RANK),
            title="test",
            component=component,
            metadata={} if phase is None else {PHASE_KEY: phase},
        )
    return folder


def drawn(pipe: Any, case: Case) -> Tensor:
    arguments = case.arguments(case.condition(), case.condition(), 1.0)
    wanted = {k: v for k, v in arguments.items() if "negative" not in k and "scale" not in k}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**wanted, height=HEIGHT_PX, width=WIDTH_PX, output_type="latent", seed=11)[0]


@torch.no_grad()
def walked(backbone: Backbone, case: Case, recipe: FewStepRecipe) -> Tensor:
    """The recipe's grid with the backbone's own x0, from the noise of seeds 11 and 12."""
    shape = random_sample(backbone).shape[1:]
    levels = recipe.levels()
    sample = levels[0].sigma * torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(11 + i)) for i in range(BATCH)]
    )
    for now, following in zip(levels, levels[1:], strict=False):
        x0 = backbone.x0(Role.STUDENT, sample, backbone.level_batch(now, BATCH), case.condition())
        sample = step(sample, x0, now, following, None, following)
    return sample


@pytest.mark.parametrize("case", [*FAMILIES, SDXL_V], ids=lambda case: case.name)
def test_the_pipeline_draws_what_the_backbone_predicts(case: Case, tmp_path: Path) -> None:
    pipe = case.build()
    backbone = wrap_pipeline(pipe)
    tensors = random_adapter(backbone)
    folder = save(backbone, tensors, tmp_path)
    assert len(list(folder.iterdir())) == max(1, len(backbone.experts))
    plain = walked(backbone, case, recipe_of(backbone))
    merge(backbone, tensors)
    expected = walked(backbone, case, recipe_of(backbone))
    ours = drawn(FewStepPipeline.wrap(case.build(), adapter=folder), case)
    if case.is_packed:
        ours = unpack(ours, *expected.shape[-2:])
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
