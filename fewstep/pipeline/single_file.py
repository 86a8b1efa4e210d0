"""Checkpoints in one file: which pipeline class they are, and the recipe they may carry.

diffusers gives such a pipeline the base model's scheduler, whatever the checkpoint was distilled
for; that is why few-step checkpoints in one file come out as noise. Here the recipe decides, and
a file that says nothing of few steps is an error.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from fewstep.adapters import read_header
from fewstep.errors import PipelineError
from fewstep.loading import without_progress_bars
from fewstep.model_files import find_base_sidecar
from fewstep.pipeline.experts.files import FoundFile
from fewstep.pipeline.wrapping import resolve
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.recipe_resolution import ResolvedRecipe

stock: Any = diffusers
MARKS = {  # part of a tensor's name -> pipeline class; the first fit wins
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
    "double_blocks.": "FluxPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "model.diffusion_model.input_blocks.": "StableDiffusionPipeline",
}


def single_file_recipe(
    path: Path, argument: FewStepRecipe | str | Path | None, files: tuple[FoundFile, ...]
) -> ResolvedRecipe:
    """The recipe for a checkpoint: the argument's, the adapter's, beside it, or its own.

    Raises:
        RecipeNotFoundError: None of them has one.
        AdapterError: The checkpoint is not a sound safetensors file.
    """
    own = read_header(path).recipe()
    named = None if own is None else ResolvedRecipe(own, f"the metadata of {path}")
    beside = find_base_sidecar(path.parent)
    return resolve(argument, files, path, beside, lambda: named)


def load_single_file(
    path: Path, *, pipeline_class: type[DiffusionPipeline] | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """The stock pipeline in a checkpoint.

    Args:
        path: A .safetensors file.
        pipeline_class: None tells it from `config=` or the names of the tensors.
        **kwargs: For diffusers' `from_single_file`: config (a folder, to stay offline), components,
            torch_dtype, ...

    Raises:
        PipelineError: Its kind of model cannot be told, or its class has no single-file loader.
    """
    chosen: Any = pipeline_class or _class_of(path, kwargs.get("config"))
    if not issubclass(chosen, stock.loaders.FromSingleFileMixin):
        raise PipelineError(
            f"diffusers cannot load {chosen.__name__} from a single file; convert the checkpoint "
            "to a diffusers folder and use from_pretrained"
        )
    with without_progress_bars():
        return chosen.from_single_file(str(path), **kwargs)


def existing_file(path: str | Path) -> Path:
    """A path that is a file.

    Raises:
        PipelineError: It is not one.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise PipelineError(
            f"{found}: there is no such file; give a .safetensors checkpoint on this machine (its "
            f"recipe may lie beside it as {SIDECAR_NAME})"
        )
    return found


def _class_of(path: Path, config: object) -> type:
    index = Path(str(config)) / "model_index.json"
    if config is not None and index.is_file():
        return getattr(stock, json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    names = read_header(path).tensors
    for mark, class_name in MARKS.items():
        if any(mark in name for name in names):
            return getattr(stock, class_name)
    raise PipelineError(f"{path}: its tensors tell no known kind of model; pass pipeline_class=")
