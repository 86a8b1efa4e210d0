"""Draws many pictures in batches, with any diffusers pipeline, and times them.

Every picture has its own seed and its own CPU noise stream, so pictures do not depend on the batch
size, and all samplers start from the same noise. Knows nothing of teachers or scores.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from fewstep.errors import ConfigError, ShapeError

BATCH_SIZE = 100
SEEDS_PER_RUN = 1_000_000
MAX_RUN_SEED = 499
"""Picture seeds from 500,000,000 on are the trainer's own: it picks its best checkpoint by them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures and what they cost.

    Attributes:
        images: Shape (N, H, W, 3), uint8.
        seconds_per_image: Wall time of prompt encoding, sampling and decoding; the median over
            batches, so that a first slow call does not count.
    """

    images: np.ndarray
    seconds_per_image: float


def picture_seeds(seed: int, count: int) -> list[int]:
    """Seeds of an evaluation's pictures: seed * 1,000,000 + i.

    Runs of different seeds share no picture, and two samplers given the same seed start each
    picture from the same noise.

    Raises:
        ConfigError: The seed or the count is out of range.
    """
    if not 0 <= seed <= MAX_RUN_SEED or count > SEEDS_PER_RUN:
        raise ConfigError(
            f"got seed {seed} for {count} pictures; wanted a seed of 0 to {MAX_RUN_SEED} and at "
            f"most {SEEDS_PER_RUN} pictures"
        )
    return [seed * SEEDS_PER_RUN + i for i in range(count)]


def generate_images(
    pipe: Callable[..., Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    options: Mapping[str, Any],
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Drawn:
    """Draw one picture per prompt with any diffusers text-to-image pipeline.

    Args:
        pipe: Called with prompt, generator (one CPU generator per picture) and output_type="np".
        prompts: N prompts.
        seeds: N seeds.
        options: Further arguments of the call, such as {"num_inference_steps": 4}.
        batch_size: Pictures per call.
        progress: Where to show a bar.

    Raises:
        ShapeError: Prompts and seeds differ in number, or there are none.
    """

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        images = pipe(
            prompt=prompts, generator=generators(seeds), output_type="np", **options
        ).images
        return to_uint8(images)

    return in_batches(draw, prompts, seeds, batch_size, progress)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 as diffusers turns them into PIL pictures."""
    return np.round(255.0 * images).astype(np.uint8)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@torch.no_grad()
def in_batches(
    draw: Callable[[list[str], list[int]], np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    progress: Progress | None,
) -> Drawn:
    """Call `draw(prompts, seeds)` for every batch; see `generate_images` for the arguments."""
    if len(prompts) != len(seeds) or not prompts:
        raise ShapeError(
            f"got {len(prompts)} prompts and {len(seeds)} seeds; wanted one seed per prompt"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
    task = progress.add_task("drawing", total=len(prompts)) if progress else None
    images, seconds = [], []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        begin = time.perf_counter()
        images.append(draw(list(prompts[batch]), list(seeds[batch])))
        seconds.append((time.perf_counter() - begin) / len(images[-1]))
        if progress and task is not None:
            progress.advance(task, len(images[-1]))
    return Drawn(np.concatenate(images), median(seconds))
