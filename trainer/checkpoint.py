"""Exact, atomic checkpoints: a folder appears complete or not at all.

A checkpoint is written to `checkpoints/.tmp-<step>`, synced and renamed, so `kill -9` at any moment
leaves the last complete one. Tensors are safetensors, the rest JSON; nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import CheckpointError

FORMAT = "fewstep.checkpoint/1"
TENSORS, STATE = "tensors.safetensors", "state.json"
KEEP = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that is needed to go on.

    Attributes:
        step: Optimizer steps done.
        tensors: Adapters, optimizer slots and the generator's state, by name.
        state: JSON-able rest: config digest, best score, length of metrics.jsonl.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a run's `checkpoints` folder and drop all but the newest two.

    Returns:
        The folder of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:07d}"
    temporary = folder / f".tmp-{checkpoint.step:07d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({k: v.contiguous() for k, v in checkpoint.tensors.items()}, temporary / TENSORS)
    body = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
    (temporary / STATE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    for name in (TENSORS, STATE):
        _sync(temporary / name)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in _complete(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run's `checkpoints` folder, or None.

    Raises:
        CheckpointError: It exists but cannot be read.
    """
    found = _complete(folder)
    if not found:
        return None
    try:
        state = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
        tensors = load_file(found[-1] / TENSORS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"{found[-1]} cannot be read ({error}); delete that folder to go on from the one before"
        ) from error
    if state.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{found[-1]} was not written by this version of the trainer; start in a new folder"
        )
    return Checkpoint(state.pop("step"), tensors, state)


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file())


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix/`, without it."""
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries renamed to `prefix/<name>`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}
