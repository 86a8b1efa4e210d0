"""Prompts to token ids without transformers."""

import json
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fewstep.errors import ExportFolderError

OURS = str(Path(__file__).resolve().parents[1])
"""Files below are fewstep's own: a warning points at the first caller elsewhere."""
ENDLESS = 1_000_000
"""transformers writes a huge model_max_length where a tokenizer has none."""


class PromptTokenizer:
    """A tokenizer of an export folder. Safe to use from several threads.

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
        self._lock = threading.Lock()  # cutting a text changes the tokenizer for a moment
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
        return self._padded([self._row(prompt, length, "", "") for prompt in prompts], length)[0]

    def encode_with_mask(
        self, prompts: list[str], length: int, *, before: str = "", after: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids padded on the right to `length`, and 1 where they are not padding.

        Args:
            prompts: What to encode.
            length: Of every row.
            before: Text in front of every prompt, as the network's template has it.
            after: Text behind it; lost where the prompt is cut, as in transformers.

        Returns:
            ids and mask, both int64, shape (len(prompts), length).
        """
        return self._padded([self._row(p, length, before, after) for p in prompts], length)

    def encode_longest(
        self, prompts: list[str], length: int, *, before: str = "", after: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_with_mask`, but only as wide as the longest row; `length` is the limit."""
        rows = [self._row(prompt, length, before, after) for prompt in prompts]
        return self._padded(rows, max(len(row) for row in rows))

    def count(self, text: str) -> int:
        """Tokens of a text, those that the tokenizer adds included."""
        return len(self._ids(text))

    def _padded(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = [row + [self._pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return np.array(ids, np.int64), np.array(mask, np.int64)

    def _row(self, prompt: str, length: int, before: str, after: str) -> list[int]:
        text = f"{before}{prompt}{after}"
        ids = self._ids(text)
        if len(ids) <= length:
            return ids
        kept, end = self._cut(text, length)
        lost = prompt[max(end - len(before), 0) :].strip()
        if lost:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and this model reads {length}; cut was: "
                f"{lost!r}",
                stacklevel=_levels_to_user(),
            )
        return kept

    def _ids(self, text: str) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text).ids)

    def _cut(self, text: str, length: int) -> tuple[list[int], int]:
        with self._lock:
            self._tokenizer.enable_truncation(length)
            try:
                kept = self._tokenizer.encode(text)
            finally:
                self._tokenizer.no_truncation()
        return list(kept.ids), max((stop for _, stop in kept.offsets), default=0)

    def _id_of(self, token: Any) -> int:
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            return 0  # never padded with
        found = self._tokenizer.token_to_id(content)
        if found is None:
            raise ExportFolderError(
                f"the tokenizer pads with {content!r}, which it does not know; export again"
            )
        return int(found)


def _levels_to_user() -> int:
    """`stacklevel` of the first caller that is not fewstep's own code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    return level
