"""The prompts of a run, encoded once: after that the text encoders are never called again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.data.cache import OnProgress, ShardCache, quiet
from fewstep.trainer.data.condition_shards import ConditionShards, joined
from fewstep.trainer.data.digests import module_digest, tokenizer_digest
from fewstep.trainer.data.prompt_files import PromptList

ENCODE_BATCH = 64
SHARD_ROWS = 1024
"""Prompts per shard of the cache: 120 MB with CLIP, 2 GB with 256 tokens of T5-XXL."""


@dataclass(frozen=True, slots=True)
class PromptBook:
    """Prompts with their embeddings.

    Attributes:
        prompts: The texts, N of them.
        conditions: Their embeddings, N rows, on the CPU; memory-mapped where they are cached.
        null_condition: Embedding of the empty prompt, one row, on the denoiser's device.
        groups: N labels, or none.
    """

    prompts: tuple[str, ...]
    conditions: Condition | ConditionShards
    null_condition: Condition
    groups: tuple[str, ...] = ()

    def take(self, index: Tensor) -> Condition:
        """Embeddings of the prompts at `index`, shape (B,), on the denoiser's device."""
        return self.conditions.take(index).to(self.null_condition.sequence.device)


def build_prompt_book(
    backbone: Backbone,
    prompt_list: PromptList,
    *,
    cache: Path | None = None,
    on_progress: OnProgress = quiet,
) -> PromptBook:
    """Encode all prompts and the empty one, or read them where they were encoded before.

    Args:
        backbone: Its text encoders are not called when everything is in the cache.
        prompt_list: From `read_prompts`.
        cache: Folder for embeddings of any number of runs and models; None keeps them in memory.
        on_progress: Told how many prompts are done.

    Raises:
        ConfigError: A cached shard is damaged or of another cache.
        ShapeError: Prompts gave embeddings of different lengths and the family has no mask.
    """
    shards = ShardCache(cache, "embeddings", encoder_facts(backbone)) if cache else None
    total = len(prompt_list)
    parts: list[Condition] = []
    for start in range(0, total, SHARD_ROWS):
        texts = prompt_list.prompts[start : start + SHARD_ROWS]

        def report(done: int, start: int = start) -> None:
            on_progress(start + done, total)

        parts.append(_encoded(backbone, texts, shards, report))
        report(len(texts))
    null = _encoded(backbone, ("",), shards, lambda done: None)
    conditions = parts[0] if len(parts) == 1 else ConditionShards(tuple(parts))
    return PromptBook(prompt_list.prompts, conditions, null.to(backbone.device), prompt_list.groups)


def encoder_facts(backbone: Backbone) -> dict[str, object]:
    """What embeddings depend on beside the prompts, for the cache's key.

    Raises:
        ConfigError: The pipeline has no text encoder to take a digest of.
    """
    components: dict[str, Any] = backbone.pipe.components
    encoders = {
        name: module_digest(part)
        for name, part in components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }
    if not encoders:
        raise ConfigError(
            f"{type(backbone.pipe).__name__} has no text encoder loaded, so its embeddings cannot "
            "be cached; set no cache"
        )
    return {
        "family": backbone.family,
        "pipeline": type(backbone.pipe).__name__,
        "dtype": str(backbone.dtype),
        "max_sequence_length": backbone.max_sequence_length,
        "encoders": encoders,
        "tokenizers": {
            name: tokenizer_digest(part)
            for name, part in components.items()
            if name.startswith("tokenizer") and part is not None
        },
    }


def _encoded(
    backbone: Backbone,
    prompts: Sequence[str],
    shards: ShardCache | None,
    report: Callable[[int], None],
) -> Condition:
    """Embeddings of one shard's prompts, on the CPU."""

    def make() -> dict[str, Tensor]:
        return _tensors(_encode(backbone, prompts, report))

    return _condition(shards.shard(list(prompts), make) if shards else make())


@torch.no_grad()
def _encode(backbone: Backbone, prompts: Sequence[str], report: Callable[[int], None]) -> Condition:
    parts: list[Condition] = []
    for start in range(0, len(prompts), ENCODE_BATCH):
        part = backbone.encode(list(prompts[start : start + ENCODE_BATCH]))
        parts.append(part.to(torch.device("cpu")))
        report(min(start + ENCODE_BATCH, len(prompts)))
    return joined(parts)


def _tensors(condition: Condition) -> dict[str, Tensor]:
    named = {"sequence": condition.sequence, "pooled": condition.pooled, "mask": condition.mask}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _condition(tensors: Mapping[str, Tensor]) -> Condition:
    return Condition(tensors["sequence"], tensors.get("pooled"), tensors.get("mask"))
