"""Conditions of prompts that were asked for before: one row per prompt, the oldest forgotten."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from fewstep.runtime.hosts.conditions import joined
from fewstep.runtime.hosts.host import Condition

Encode = Callable[[list[str]], Condition]
SLOTS = 64


class PromptCache:
    """Encodes each prompt once. Safe to use from several threads.

    Args:
        slots: Prompts that are remembered.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots, self._lock = slots, threading.Lock()
        self._rows: OrderedDict[tuple[str, str], Condition] = OrderedDict()
        self.hits = 0

    def conditions(self, side: str, prompts: Sequence[str], encode: Encode) -> Condition:
        """One row per prompt, in order.

        Args:
            side: "prompt" or "negative": a text may be encoded differently on either.
            prompts: Texts, any of them more than once.
            encode: Called with the texts that are not known, each once.
        """
        with self._lock:
            known = {p: self._rows[side, p] for p in prompts if (side, p) in self._rows}
            for prompt in known:
                self._rows.move_to_end((side, prompt))
            self.hits += len(known)
        missing = list(dict.fromkeys(p for p in prompts if p not in known))
        if missing:
            found = encode(missing)
            fresh = {
                prompt: {name: value[i : i + 1] for name, value in found.items()}
                for i, prompt in enumerate(missing)
            }
            known |= fresh
            self._remember(side, fresh)
        return joined([known[prompt] for prompt in prompts])

    def _remember(self, side: str, fresh: dict[str, Condition]) -> None:
        with self._lock:
            for prompt, row in fresh.items():
                self._rows[side, prompt] = {name: value.copy() for name, value in row.items()}
            while len(self._rows) > self._slots:
                self._rows.popitem(last=False)
