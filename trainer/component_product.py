"""The product of a student that is a network of its own: a pipeline component and its recipe."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.trainer.run_folder import write_text


def write_component(
    folder: Path, network: nn.Module, component: str, recipe: FewStepRecipe
) -> Path:
    """Save a network as `from_pretrained` loads it, with the recipe beside it; whole or not at all.

    Use it with `Class.from_pretrained(folder / component)`, put into the base's pipeline, and
    `FewStepPipeline.wrap(pipe, recipe=folder / "fewstep_recipe.json")`.

    Args:
        folder: Becomes `folder`/<component>/ and `folder`/fewstep_recipe.json.
        network: A diffusers model; written in float32.
        component: Its name in the pipeline.
        recipe: How it is sampled.

    Returns:
        The folder.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model: Any = network
    model.save_pretrained(temporary / component)
    write_text(temporary / SIDECAR_NAME, recipe.to_json(indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return folder
