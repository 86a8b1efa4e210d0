"""Pictures to latents, size by size and shard by shard; what is cached is not encoded again."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.data.buckets import Bucket, aspect_buckets, fit, nearest_bucket
from fewstep.trainer.data.cache import OnProgress, ShardCache
from fewstep.trainer.data.digests import config_of, module_digest
from fewstep.trainer.data.pictures import Picture, decoded
from fewstep.trainer.data.rows import BadRowError, BadRows

logger = logging.getLogger(__name__)

SHARD_ROWS = 256
"""Pictures per shard: 64 MB of latents at 1024 px with 16 channels."""
BATCH_PX = 4 * 1024 * 1024
"""Pixels that go through the VAE at once; at most `MAX_BATCH` pictures."""
MAX_BATCH = 64
DECODE_THREADS = 8
"""Pillow decodes and resizes without the interpreter's lock."""
STEP_PX = 64
"""Grid of the buckets, unless the model needs a coarser one or the pictures are smaller."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One shard.

    Attributes:
        bucket: (height, width) of its pictures in px.
        latents: Shape (n, C, h, w), float32, on the CPU, in the denoiser's own scale.
        captions: n texts.
    """

    bucket: Bucket
    latents: Tensor
    captions: tuple[str, ...]


def encode_pictures(
    backbone: Backbone,
    pictures: Sequence[Picture],
    *,
    area_px: int,
    max_aspect: float,
    cache: Path | None,
    bad: BadRows,
    on_progress: OnProgress,
) -> list[Encoded]:
    """Every picture at the size of its nearest bucket, through the VAE or from the cache.

    Args:
        backbone: Its `encode_images` does the encoding.
        pictures: In any order; a shard's pictures keep it.
        area_px: Pixels of a bucket, at most; 0 takes the model's own size.
        max_aspect: Of a bucket.
        cache: Folder, or None.
        bad: Meets damaged pictures.
        on_progress: Told after every batch and shard.

    Raises:
        ConfigError: A picture is damaged and not to be skipped, the VAE gave values that are not
            finite, or a cached shard is damaged.
    """
    by_bucket = _by_bucket(backbone, pictures, area_px, max_aspect)
    shards = ShardCache(cache, "latents", vae_facts(backbone)) if cache else None
    found: list[Encoded] = []
    done = 0
    for bucket in sorted(by_bucket):
        members = by_bucket[bucket]
        for start in range(0, len(members), SHARD_ROWS):
            chunk = members[start : start + SHARD_ROWS]

            def report(count: int, done: int = done) -> None:
                on_progress(done + count, len(pictures))

            encoded = _shard(backbone, bucket, chunk, shards, bad, report)
            done += len(chunk)
            on_progress(done, len(pictures))
            if encoded.captions:
                found.append(encoded)
    return found


def vae_facts(backbone: Backbone) -> dict[str, object]:
    """What latents depend on beside the pictures, for the cache's key."""
    vae: Any = backbone.pipe.vae
    return {
        "family": backbone.family,
        "pipeline": type(backbone.pipe).__name__,
        "vae": module_digest(vae),
        "config": config_of(vae),
        "dtype": str(vae.dtype),
    }


def _by_bucket(
    backbone: Backbone, pictures: Sequence[Picture], area_px: int, max_aspect: float
) -> dict[Bucket, list[Picture]]:
    layout = backbone.layout
    area = area_px or layout.height * layout.width * layout.factor**2
    own = layout.factor * layout.patch
    coarse = math.lcm(own, STEP_PX)
    step = coarse if area >= coarse * coarse else own
    buckets = aspect_buckets(area, step_px=step, max_aspect=max_aspect)
    found: dict[Bucket, list[Picture]] = {}
    enlarged = 0
    for picture in pictures:
        bucket = nearest_bucket(picture.height_px, picture.width_px, buckets)
        found.setdefault(bucket, []).append(picture)
        enlarged += picture.height_px < bucket[0] or picture.width_px < bucket[1]
    if enlarged:
        logger.warning(
            "%d of %d pictures are smaller than their bucket (up to %d px of area) and will be "
            "enlarged; give larger pictures or a smaller area_px",
            *(enlarged, len(pictures), area),
        )
    return found


def _shard(
    backbone: Backbone,
    bucket: Bucket,
    pictures: Sequence[Picture],
    shards: ShardCache | None,
    bad: BadRows,
    report: Callable[[int], None],
) -> Encoded:
    """One shard's latents; `rows` in the cache are its good pictures, counted in the shard."""

    def make() -> dict[str, Tensor]:
        return _encoded(backbone, bucket, pictures, bad, report)

    before = bad.count
    content = [list(bucket), [picture.identity() for picture in pictures]]
    tensors = shards.shard(content, make) if shards else make()
    rows: list[int] = tensors["rows"].tolist()
    if bad.count == before and len(rows) < len(pictures):
        _complain(pictures, rows, bad)  # they were skipped when the shard was made
    return Encoded(bucket, tensors["latents"], tuple(pictures[row].caption for row in rows))


def _complain(pictures: Sequence[Picture], rows: Sequence[int], bad: BadRows) -> None:
    """Meet the pictures again that a cached shard has left out."""
    for row in sorted(set(range(len(pictures))) - set(rows)):
        bad.meet(BadRowError(pictures[row].place.where, "could not be decoded when it was cached"))


@torch.no_grad()
def _encoded(
    backbone: Backbone,
    bucket: Bucket,
    pictures: Sequence[Picture],
    bad: BadRows,
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    size = max(1, min(MAX_BATCH, BATCH_PX // (bucket[0] * bucket[1])))
    rows: list[int] = []
    parts: list[Tensor] = []
    for start in range(0, len(pictures), size):
        batch: list[Tensor] = []
        numbers: list[int] = []
        for row, pixels in _pixels(
            pictures, range(start, min(start + size, len(pictures))), bucket, bad
        ):
            numbers.append(row)
            batch.append(pixels)
        if batch:
            latents = backbone.encode_images(torch.stack(batch)).float().cpu()
            _check_finite(latents, [pictures[row] for row in numbers])
            parts.append(latents)
            rows += numbers
        report(start + len(batch))
    return {
        "latents": torch.cat(parts) if parts else torch.empty(0),
        "rows": torch.tensor(rows, dtype=torch.long),
    }


def _pixels(
    pictures: Sequence[Picture], rows: Sequence[int], bucket: Bucket, bad: BadRows
) -> Iterator[tuple[int, Tensor]]:
    """(row, pixels 0 to 1 of shape (3, H, W)) of the pictures that can be decoded, in order."""

    def load(row: int) -> Tensor | BadRowError:
        try:
            image = fit(decoded(pictures[row].place), bucket)
        except BadRowError as error:
            return error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for row, loaded in zip(rows, pool.map(load, rows), strict=True):
            if isinstance(loaded, BadRowError):
                bad.meet(loaded)
            else:
                yield row, loaded


def _check_finite(latents: Tensor, pictures: Sequence[Picture]) -> None:
    for picture, values in zip(pictures, latents, strict=True):
        if not torch.isfinite(values).all():
            raise ConfigError(
                f"the VAE gave values that are not finite for {picture.place.where}; load it in "
                "fp32 or bf16 (fp16 overflows in some, SDXL's first of all)"
            )
