"""Z-Image."""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size

MULTIPLE = 32
"""The network reads texts in multiples of this many tokens."""


class ZImageHost(Host):
    """States of the prompt in its chat template."""

    family: ClassVar[str] = "z-image"

    def encode(self, prompts: list[str]) -> Condition:
        stock = int(self.manifest.settings["max_sequence_length"])
        ids, mask = self.parts.tokenizer("tokenizer").encode_longest(
            prompts,
            self.recipe.base.max_sequence_length or stock,
            before=self.manifest.texts["before"],
            after=self.manifest.texts["after"],
        )
        missing = ((0, 0), (0, -ids.shape[1] % MULTIPLE))
        ids, mask = np.pad(ids, missing), np.pad(mask, missing)
        session = self.parts.session("text_encoder")
        found = session.run({"input_ids": ids, "attention_mask": mask})
        return {
            "encoder_hidden_states": found["last_hidden_state"],
            "encoder_attention_mask": mask,
        }

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([(1000.0 - timestep) / 1000.0], np.float32)
        return {"hidden_states": sample, "timestep": told, **condition}

    def answer(self, output: np.ndarray, size: Size) -> np.ndarray:
        return -output
