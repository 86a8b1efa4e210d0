"""Saving a few-step pipeline: a folder that samples right with fewstep, and as right as it can be
without.

    model_index.json, unet/, vae/, ...   stock diffusers, every class of it
    scheduler/                           the stock scheduler nearest to the recipe
    fewstep_recipe.json                  what FewStepPipeline.from_pretrained finds again
    README.md                            a model card that says both

No class of ours is named in it: diffusers refuses a hub repository whose model_index.json names a
class it cannot import.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.pipeline.model_card import CARD_MARK, model_card
from fewstep.pipeline.stock_scheduler import StockScheduler, stock_scheduler
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe

CARD_NAME = "README.md"
PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


def save_folder(
    pipe: DiffusionPipeline,
    save: Callable[..., None],
    folder: Path,
    *args: Any,
    class_name: str,
    recipe: FewStepRecipe,
    num_steps: int,
    replaced: Any,
    **kwargs: Any,
) -> StockScheduler:
    """Write the folder.

    Args:
        pipe: A wrapped pipeline without LoRA layers; as it was afterwards.
        save: The stock `save_pretrained`.
        folder: Where to; made if needed. A README.md that is not ours is left alone.
        class_name: The stock pipeline class.
        recipe: What is written beside the weights.
        num_steps: Step count the stock scheduler is made for.
        replaced: The scheduler the pipeline came with, written where no stock one fits.
        *args: For diffusers.
        **kwargs: Likewise; with `push_to_hub` the folder is uploaded when it is whole (the
            upload itself needs the network and is not tested).

    Returns:
        Which stock scheduler was written, and what it does differently.
    """
    is_pushed = kwargs.pop("push_to_hub", False)
    push = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
    stand_in = stock_scheduler(class_name, recipe, num_steps)
    ours: Any = pipe
    before = ours.scheduler
    folder.mkdir(parents=True, exist_ok=True)
    ours.scheduler = replaced if stand_in.scheduler is None else stand_in.scheduler
    try:
        save(str(folder), *args, **kwargs)
    finally:
        ours.scheduler = before
    write_text(folder / SIDECAR_NAME, recipe.to_json(indent=2) + "\n")
    card = folder / CARD_NAME
    if not card.exists() or CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
        title = push.get("repo_id", folder.resolve().name).rpartition("/")[2]
        write_text(card, model_card(title, class_name, recipe, num_steps, stand_in))
    if is_pushed:
        _push(ours, folder, **push)
    return stand_in


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _push(pipe: Any, folder: Path, **options: Any) -> None:
    from huggingface_hub import create_repo

    token, private = options.get("token"), options.get("private")
    repo_id = options.get("repo_id", folder.resolve().name)
    repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
    pipe._upload_folder(
        str(folder),
        repo_id,
        token=token,
        commit_message=options.get("commit_message"),
        create_pr=options.get("create_pr", False),
    )
