"""Real latents of a run, by size, each with its prompt: what data terms compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from fewstep.digits.data import Digits, load_digits
from fewstep.digits.weights import cache_root
from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.data.cache import OnProgress, ShardCache, quiet
from fewstep.trainer.data.condition_shards import located
from fewstep.trainer.data.digests import tensor_digest
from fewstep.trainer.data.images import ImageSource, read_images
from fewstep.trainer.data.latent_files import LatentFile, LatentFiles
from fewstep.trainer.data.picture_latents import Encoded, encode_pictures, vae_facts
from fewstep.trainer.data.pictures import Picture
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.data.prompt_files import PromptList
from fewstep.trainer.data.rows import BadRowError, BadRows

DIGITS_BATCH = 8


@dataclass(frozen=True, slots=True)
class LatentBucket:
    """Latents of one size.

    Attributes:
        parts: In the denoiser's own scale, each (n, C, h, w) or (n, C, frames, h, w), any float
            type, on the CPU; memory-mapped where they come from a file.
        prompt: Rows of the prompt book, shape (N,), int64; N counts over all parts.
    """

    parts: tuple[Tensor, ...]
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent, (C, h, w) or (C, frames, h, w)."""
        return tuple(self.parts[0].shape[1:])

    @property
    def latents(self) -> Tensor:
        """All of them, shape (N, ...), float32; read into memory."""
        return torch.cat([part.float() for part in self.parts])

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, prompt) at `index`, shape (B,): float32 (B, ...) and int64 (B,), on the CPU."""
        index = index.cpu()
        which, within = located(index, [len(part) for part in self.parts])
        x0 = torch.empty((len(index), *self.shape))
        for number in which.unique().tolist():
            here = which == number
            x0[here] = self.parts[number][within[here]].float()
        return x0, self.prompt[index]


@dataclass(frozen=True, slots=True)
class LatentBook:
    """All real latents of a run.

    Attributes:
        buckets: One per size, none empty.
    """

    buckets: tuple[LatentBucket, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one latent of every bucket, (C, h, w)."""
        return tuple(bucket.shape for bucket in self.buckets)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of latents of every bucket."""
        return tuple(len(bucket) for bucket in self.buckets)

    def draw_bucket(self, generator: torch.Generator) -> int:
        """A bucket, by the number of its latents, so that every picture is as likely."""
        row = int(torch.randint(sum(self.sizes), (1,), generator=generator))
        return int(located(torch.tensor([row]), self.sizes)[0])

    def take(self, bucket: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, prompt) of a bucket's rows, as `LatentBucket.take`."""
        return self.buckets[bucket].take(index)


def build_latent_book(
    backbone: Backbone,
    source: str | ImageSource,
    book: PromptBook | PromptList,
    *,
    area_px: int = 0,
    max_aspect: float = 2.0,
    cache: Path | None = None,
    skip_bad: bool = False,
    on_progress: OnProgress = quiet,
) -> LatentBook:
    """Latents of a source; pictures are encoded once.

    Args:
        backbone: Its VAE is not called for what is in the cache.
        source: What `read_images` reads, or what it returned.
        book: The prompts that `LatentBucket.prompt` counts in; every caption must be one of them.
            Without a prompts file that is `build_prompt_book(backbone, source.captions(), ...)`.
        area_px: Pixels of a picture, for the aspect buckets; 0 takes the model's own size.
        max_aspect: Longer side over shorter side of a bucket, at most.
        cache: Folder for latents of any number of runs and models; None keeps them in memory.
        skip_bad: Count pictures that cannot be used and warn once, instead of raising.
        on_progress: Told how many pictures are done.

    Raises:
        ConfigError: The source cannot be read or does not fit the model, a picture is damaged, a
            caption is not among the prompts, or a cached shard is damaged or of another cache.
    """
    found = read_images(source, skip_bad=skip_bad) if isinstance(source, str) else source
    bad = BadRows(found.source, skip=skip_bad)
    rows = {prompt: row for row, prompt in reversed(list(enumerate(book.prompts)))}
    if isinstance(found, LatentFiles):
        if area_px:
            raise ConfigError(
                f"{found.source} holds latents, whose size is what it is; set area_px to 0"
            )
        buckets = _of_files(found.files, rows, backbone.latent_shape()[0], bad)
    else:
        encoded = encode_pictures(
            backbone,
            [picture for picture in found.pictures if _is_known(picture, rows, bad)],
            area_px=area_px,
            max_aspect=max_aspect,
            cache=cache,
            bad=bad,
            on_progress=on_progress,
        )
        buckets = _of_pictures(encoded, rows)
    if not buckets:
        raise bad.nothing_left("pictures")
    bad.warn()
    return LatentBook(tuple(buckets))


def digits_latents(backbone: Backbone, book: PromptBook) -> LatentBook:
    """Latents of the shipped real digits, all 1797, as `latents_of_digits`.

    Raises:
        ConfigError: A digit has no prompt.
        MissingExtraError: scikit-learn is not installed.
    """
    return latents_of_digits(backbone, load_digits(), book)


def latents_of_digits(backbone: Backbone, digits: Digits, book: PromptBook) -> LatentBook:
    """Latents of real digits, each with a prompt that asks for it.

    Pictures of one digit take the prompts of its group in turn. Encoding all takes about 20 s on a
    CPU, so latents are kept beside the teachers' folders (`fewstep.digits.weights.cache_root`).

    Args:
        backbone: Of a digits teacher.
        digits: Pictures and labels.
        book: Its groups are the digits "0" to "9".

    Raises:
        ConfigError: A digit has no prompt.
    """
    asking: dict[str, list[int]] = {}
    for row, group in enumerate(book.groups):
        asking.setdefault(group, []).append(row)
    missing = sorted({str(label) for label in digits.labels.tolist()} - set(asking))
    if missing:
        raise ConfigError(
            f"no prompt asks for the digits {', '.join(missing)}; give prompts whose groups are "
            "the digits 0 to 9"
        )
    turns = {group: cycle(rows) for group, rows in asking.items()}
    prompt = [next(turns[str(label)]) for label in digits.labels.tolist()]
    images = torch.from_numpy(digits.images)

    def make() -> dict[str, Tensor]:
        parts = images.permute(0, 3, 1, 2).split(DIGITS_BATCH)
        return {"latents": torch.cat([_encoded_digits(backbone, part) for part in parts])}

    shards = ShardCache(cache_root(), "latents", vae_facts(backbone))
    latents = shards.shard(["digits", tensor_digest(images)], make)["latents"]
    return LatentBook((LatentBucket((latents,), torch.tensor(prompt)),))


def _encoded_digits(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.encode_images(images.float() / 255.0).float().cpu()


def _is_known(picture: Picture, rows: Mapping[str, int], bad: BadRows) -> bool:
    if picture.caption in rows:
        return True
    bad.meet(_unknown(picture.place.where, picture.caption))
    return False


def _unknown(where: str, caption: str) -> BadRowError:
    shown = caption if len(caption) <= 60 else f"{caption[:57]}..."
    return BadRowError(
        where,
        f'its caption "{shown}" is not among the prompts (leave the prompts file out to train on '
        "the captions)",
    )


def _of_pictures(encoded: Sequence[Encoded], rows: Mapping[str, int]) -> list[LatentBucket]:
    """Buckets of encoded shards, which come size by size."""
    parts: dict[tuple[int, int], list[Encoded]] = {}
    for shard in encoded:
        parts.setdefault(shard.bucket, []).append(shard)
    return [
        LatentBucket(
            tuple(shard.latents for shard in shards),
            torch.tensor([rows[text] for shard in shards for text in shard.captions]),
        )
        for shards in parts.values()
    ]


def _of_files(
    files: Sequence[LatentFile], rows: Mapping[str, int], channels: int, bad: BadRows
) -> list[LatentBucket]:
    """Buckets of latent files, by the shape of their latents."""
    parts: dict[tuple[int, ...], list[Tensor]] = {}
    prompts: dict[tuple[int, ...], list[int]] = {}
    for file in files:
        shape = tuple(file.latents.shape[1:])
        if shape[0] != channels:
            raise ConfigError(
                f"{file.path} has latents of {shape[0]} channels, this model's have {channels}; "
                "encode the pictures with this model's VAE"
            )
        kept: list[int] = []
        for row, text in enumerate(file.prompts):
            if text in rows:
                kept.append(row)
                prompts.setdefault(shape, []).append(rows[text])
            else:
                bad.meet(_unknown(f"{file.path}, row {row + 1}", text))
        if kept:
            whole = len(kept) == len(file.latents)
            parts.setdefault(shape, []).append(
                file.latents if whole else file.latents[torch.tensor(kept)]
            )
    return [LatentBucket(tuple(parts[shape]), torch.tensor(prompts[shape])) for shape in parts]
