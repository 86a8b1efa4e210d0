"""Qwen-Image."""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size
from fewstep.runtime.hosts.packing import pack, unpack


class QwenImageHost(Host):
    """States of the prompt in its template, without those of the template's beginning."""

    family: ClassVar[str] = "qwen-image"
    no_negative: ClassVar[str] = " "

    def encode(self, prompts: list[str]) -> Condition:
        settings = self.manifest.settings
        dropped = int(settings["dropped_tokens"])
        length = self.recipe.base.max_sequence_length or int(settings["max_sequence_length"])
        ids, mask = self.parts.tokenizer("tokenizer").encode_longest(
            prompts,
            dropped + length,
            before=self.manifest.texts["before"],
            after=self.manifest.texts["after"],
        )
        session = self.parts.session("text_encoder")
        found = session.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        kept = mask[:, dropped:]
        states = found[:, dropped:] * kept[..., None].astype(found.dtype)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": kept}

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([timestep / 1000.0], np.float32)
        return {"hidden_states": sample, "timestep": told, **condition}

    def guide(self, without: np.ndarray, with_prompt: np.ndarray, scale: float) -> np.ndarray:
        """As long, per token, as the prediction with the prompt."""
        mixed = pack(super().guide(without, with_prompt, scale))
        wanted, found = (
            np.linalg.norm(tokens, axis=-1, keepdims=True) for tokens in (pack(with_prompt), mixed)
        )
        return unpack(mixed * (wanted / found), *with_prompt.shape[2:])
