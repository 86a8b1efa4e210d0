"""Sana.

Pictures are drawn at exactly the size asked for; the stock pipeline draws at the nearest size of a
table and resizes.
"""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size


class SanaHost(Host):
    """Gemma's states of the prompt alone: those of the instruction before it are dropped."""

    family: ClassVar[str] = "sana"

    def encode(self, prompts: list[str]) -> Condition:
        before, length = self.manifest.texts["before"], self._length
        # the instruction's own end token and the prompt's start token are counted twice
        whole = self.parts.tokenizer("tokenizer").count(before) + length - 2
        states, mask = self._states(prompts, whole, before)
        rest = whole - length + 1
        return {
            "encoder_hidden_states": np.concatenate([states[:, :1], states[:, rest:]], axis=1),
            "encoder_attention_mask": np.concatenate([mask[:, :1], mask[:, rest:]], axis=1),
        }

    def unconditional(self, negative: list[str]) -> Condition:
        states, mask = self._states(negative, self._length, "")
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    @property
    def _length(self) -> int:
        stock = int(self.manifest.settings["max_sequence_length"])
        return self.recipe.base.max_sequence_length or stock

    def _states(
        self, prompts: list[str], length: int, before: str
    ) -> tuple[np.ndarray, np.ndarray]:
        plain = [prompt.lower().strip() for prompt in prompts]
        tokenizer = self.parts.tokenizer("tokenizer")
        ids, mask = tokenizer.encode_with_mask(plain, length, before=before)
        session = self.parts.session("text_encoder")
        found = session.run({"input_ids": ids, "attention_mask": mask})
        return found["last_hidden_state"], mask

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([timestep * self.manifest.settings["timestep_scale"]], np.float32)
        return {"hidden_states": sample, "timestep": told, **condition}
