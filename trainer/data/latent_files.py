"""Latents that were made elsewhere: .safetensors files with `latents` and their prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.data.pictures import unique_prompts
from fewstep.trainer.data.prompt_files import PromptList
from fewstep.trainer.data.rows import BadRowError, BadRows, checked_text

LATENTS = "latents"
PROMPTS = "prompts"


@dataclass(frozen=True, slots=True)
class LatentFile:
    """One file.

    Attributes:
        path: Of the file.
        latents: In the denoiser's own scale, shape (N, C, h, w) or (N, C, frames, h, w), any float
            dtype; memory-mapped unless rows were left out.
        prompts: N texts.
    """

    path: Path
    latents: Tensor
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LatentFiles:
    """The latents of a source.

    Attributes:
        files: By name.
        skipped: Bad rows that were left out.
        source: Where they are from.
    """

    files: tuple[LatentFile, ...]
    skipped: int
    source: str

    def captions(self) -> PromptList:
        """Every prompt once, in the order of their first latents."""
        return unique_prompts([p for file in self.files for p in file.prompts], self.source)


def read_latent_file(path: Path, bad: BadRows) -> LatentFile:
    """Open one file and check every row.

    Args:
        path: A .safetensors file: tensor `latents`, and a JSON list of texts as `prompts` in its
            metadata.
        bad: Meets rows that are not finite or whose prompt is empty or no text.

    Raises:
        ConfigError: The file is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            latents = file.get_tensor(LATENTS) if LATENTS in file.keys() else None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a safetensors file ({error})") from error
    if latents is None or latents.ndim < 4 or not latents.is_floating_point():
        found = "none" if latents is None else f"{latents.dtype} of shape {tuple(latents.shape)}"
        raise ConfigError(
            f"{path} has no usable tensor {LATENTS} ({found}); wanted floats (N, C, h, w)"
        )
    prompts = _prompts(path, metadata.get(PROMPTS, ""), len(latents))
    good: list[int] = []
    texts: list[str] = []
    for row, prompt in enumerate(prompts):
        try:
            texts.append(_checked(path, row, latents[row], prompt))
        except BadRowError as error:
            bad.meet(error)
        else:
            good.append(row)
    kept = latents if len(good) == len(latents) else latents[torch.tensor(good, dtype=torch.long)]
    return LatentFile(path, kept, tuple(texts))


def _prompts(path: Path, text: str, num_rows: int) -> list[object]:
    wanted = f"a JSON list of {num_rows} texts"
    try:
        prompts = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"not JSON, {error}" if text else "there is none"
        raise ConfigError(f"{path}: metadata {PROMPTS} must be {wanted} ({found})") from error
    if not isinstance(prompts, list) or len(prompts) != num_rows:
        found = f"{len(prompts)} entries" if isinstance(prompts, list) else type(prompts).__name__
        raise ConfigError(f"{path}: metadata {PROMPTS} must be {wanted}, got {found}")
    return prompts


def _checked(path: Path, row: int, latents: Tensor, prompt: object) -> str:
    where = f"{path}, row {row + 1}"
    if not torch.isfinite(latents).all():
        raise BadRowError(where, "holds values that are not finite")
    if not isinstance(prompt, str):
        raise BadRowError(where, f"has a {type(prompt).__name__} as prompt; wanted text")
    return checked_text(prompt, where, "the prompt")
