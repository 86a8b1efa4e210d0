"""The prompts of a run, encoded once: after that the text encoders are never called again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.backbone import Backbone, Condition

ENCODE_BATCH = 64


@dataclass(frozen=True, slots=True)
class PromptBook:
    """Prompts with their cached embeddings.

    Attributes:
        prompts: The texts, N of them.
        conditions: Their embeddings, N rows.
        null_condition: Embedding of the empty prompt, one row.
    """

    prompts: tuple[str, ...]
    conditions: Condition
    null_condition: Condition

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` prompts drawn uniformly, shape (count,)."""
        return torch.randint(len(self.prompts), (count,), generator=generator)


def build_prompt_book(backbone: Backbone, prompts: list[str]) -> PromptBook:
    """Encode all prompts and the empty one."""
    parts = [
        backbone.encode(prompts[i : i + ENCODE_BATCH]) for i in range(0, len(prompts), ENCODE_BATCH)
    ]
    conditions = parts[0]
    for part in parts[1:]:
        conditions = conditions.beside(part)
    return PromptBook(tuple(prompts), conditions, backbone.encode([""]))


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        ConfigError: The file is missing or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"prompts file {path} cannot be read ({error.strerror})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts file {path} has no prompts; write one per line")
    return prompts
