"""Stable Diffusion 3 and 3.5."""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size, zeros_beside
from fewstep.runtime.hosts.stable_diffusion import last_but_one

T5_LENGTH = 256


class StableDiffusion3Host(Host):
    """Two CLIP encoders side by side, then T5's tokens (zeros where T5 was dropped)."""

    family: ClassVar[str] = "sd3"

    def encode(self, prompts: list[str]) -> Condition:
        length = int(self.manifest.settings["tokenizer_max_length"])
        states, pooled = [], []
        for suffix in ("", "_2"):
            ids = self.parts.tokenizer(f"tokenizer{suffix}").encode(prompts, length)
            session = self.parts.session(f"text_encoder{suffix}")
            last = last_but_one(session.graph.outputs)
            found = session.run({"input_ids": ids}, ["text_embeds", last])
            states.append(found[last])
            pooled.append(found["text_embeds"])
        clip = np.concatenate(states, axis=-1)
        missing = int(self.manifest.settings["joint_attention_dim"]) - clip.shape[-1]
        clip = np.pad(clip, ((0, 0), (0, 0), (0, missing)))
        return {
            "encoder_hidden_states": np.concatenate([clip, self._t5(prompts, clip)], axis=1),
            "pooled_projections": np.concatenate(pooled, axis=-1),
        }

    def _t5(self, prompts: list[str], clip: np.ndarray) -> np.ndarray:
        length = self.recipe.base.max_sequence_length or T5_LENGTH
        if "text_encoder_3" not in self.manifest.graphs:
            return zeros_beside(clip, length)
        ids = self.parts.tokenizer("tokenizer_3").encode(prompts, length)
        session = self.parts.session("text_encoder_3")
        return session.run({"input_ids": ids})["last_hidden_state"]

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([timestep], np.float32)
        return {"hidden_states": sample, "timestep": told, **condition}
