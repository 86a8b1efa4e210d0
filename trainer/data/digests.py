"""What cached tensors depend on, as sha256 digests: weights, tokenizers, texts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def digest_of(data: object) -> str:
    """Digest of plain data (what JSON can hold), equal for equal data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_digest(module: nn.Module) -> str:
    """Digest of a network's weights and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode("utf-8"))
        if isinstance(value, Tensor):
            digest.update(tensor_digest(value).encode())
    return digest.hexdigest()


def tensor_digest(values: Tensor) -> str:
    """Digest of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
    data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(data.numpy().data)
    return digest.hexdigest()


def config_of(model: Any) -> dict[str, object]:
    """A diffusers model's config without where it was loaded from and by which release."""
    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(kept, default=str))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids.

    Calling a tokenizer changes the truncation and padding it would save, so those are left out;
    they are arguments of the pipelines' encoders, not its own.
    """
    facts: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "length": tokenizer.model_max_length,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["content"] = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    else:
        facts["content"] = tokenizer.get_vocab()
    return digest_of(facts)
