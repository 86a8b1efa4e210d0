"""What a run leaves behind: config.json, environment.json, metrics.jsonl, sample grids."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.errors import CheckpointError
from fewstep.trainer.config import NOT_SHAPING, TrainConfig

PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "numpy", "safetensors")


class RunFolder:
    """Paths and writers of one run.

    Args:
        root: The folder; made if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.metrics_file = root / "metrics.jsonl"

    def open(self, config: TrainConfig) -> None:
        """Make the folder, or check that it belongs to this very config.

        Raises:
            CheckpointError: The folder holds a run with other settings.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "config.json"
        if file.exists():
            before = TrainConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
            if before.digest() != config.digest():
                change = _first_change(before, config)
                raise CheckpointError(
                    f"{self.root} holds a run with other settings ({change}); "
                    "choose another --out, or repeat those settings to continue it"
                )
        write_json(file, config.to_dict())
        write_json(self.root / "environment.json", _environment())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after `step`: they belong to steps that will be run again."""
        if not self.metrics_file.exists():
            return
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.metrics_file, text)

    def read_metrics(self) -> list[dict[str, float]]:
        """All complete lines of metrics.jsonl (a line cut by a crash is left out)."""
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def save_grid(self, step: int, images: np.ndarray, columns: int) -> Path:
        """Write pictures (N, H, W, 3) uint8 as one PNG with that many columns."""
        file = self.root / "samples" / f"step-{step:07d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(tile(images, columns)).save(file)
        return file


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (N, H, W, 3) as one, row by row; N must be a multiple of `columns`."""
    count, height, width, channels = images.shape
    rows = count // columns
    grid = images.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _environment() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
    }


def _first_change(before: TrainConfig, after: TrainConfig) -> str:
    old, new = flat_settings(before.to_dict()), flat_settings(after.to_dict())
    name = next(k for k in new if old.get(k) != new[k] and k not in NOT_SHAPING)
    return f"{name} was {old.get(name)}, now {new[name]}"


def flat_settings(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, such as `lora.rank`."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found.update(flat_settings(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
