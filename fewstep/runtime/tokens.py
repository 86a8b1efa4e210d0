"""Prompts to token ids without transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fewstep.errors import ExportFolderError

USER = 6
"""Stack depth of whoever called the runtime, for warnings."""
ENDLESS = 1_000_000
"""transformers writes a huge model_max_length where a tokenizer has none."""


class PromptTokenizer:
    """A tokenizer of an export folder.

    Args:
        folder: Holds tokenizer.json and tokenizer_config.json.

    Raises:
        ExportFolderError: Either is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            text = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
            config: dict[str, Any] = json.loads(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise ExportFolderError(
                f"the tokenizer in {folder} cannot be read ({error}); export again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        length = config.get("model_max_length") or ENDLESS
        self.max_length = int(length) if length < ENDLESS else None
        self._pad = self._id_of(config.get("pad_token"))

    def encode(self, prompts: list[str], length: int) -> np.ndarray:
        """Token ids, padded; prompts that are too long are cut, with a warning that says where.

        Args:
            prompts: What to encode.
            length: Of every row.

        Returns:
            int64, shape (len(prompts), length).
        """
        return np.array([self._row(prompt, length) for prompt in prompts], np.int64)

    def _row(self, prompt: str, length: int) -> list[int]:
        ids = self._tokenizer.encode(prompt).ids
        if len(ids) > length:
            ids = self._cut(prompt, ids, length)
        return ids + [self._pad] * (length - len(ids))

    def _cut(self, prompt: str, ids: list[int], length: int) -> list[int]:
        self._tokenizer.enable_truncation(length)
        try:
            kept = self._tokenizer.encode(prompt)
        finally:
            self._tokenizer.no_truncation()
        end = max((stop for _, stop in kept.offsets), default=0)
        warnings.warn(
            f"the prompt has {len(ids)} tokens and this model reads {length}; cut was: "
            f"{prompt[end:].strip()!r}",
            stacklevel=USER,
        )
        return list(kept.ids)

    def _id_of(self, token: Any) -> int:
        content = token.get("content") if isinstance(token, dict) else token
        found = None if content is None else self._tokenizer.token_to_id(content)
        return 0 if found is None else int(found)
