"""PixArt-Alpha and PixArt-Sigma.

Pictures are drawn at exactly the size asked for; stock pipelines draw at the nearest size of a
table and resize. Prompts are put into lower case, as stock pipelines do without ftfy and bs4.
"""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size, per_picture


class PixArtHost(Host):
    """T5's tokens with their mask, and the picture's size where the network is told it."""

    family: ClassVar[str] = "pixart"

    def encode(self, prompts: list[str]) -> Condition:
        stock = int(self.manifest.settings["max_sequence_length"])
        length = self.recipe.base.max_sequence_length or stock
        plain = [prompt.lower().strip() for prompt in prompts]
        ids, mask = self.parts.tokenizer("tokenizer").encode_with_mask(plain, length)
        session = self.parts.session("text_encoder")
        found = session.run({"input_ids": ids, "attention_mask": mask})
        return {
            "encoder_hidden_states": found["last_hidden_state"],
            "encoder_attention_mask": mask,
        }

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([timestep], np.float32)
        feeds = {"hidden_states": sample, "timestep": told, **condition}
        inputs = self.manifest.graphs[self.denoiser].inputs
        if any(tensor.name == "resolution" for tensor in inputs):
            sides = np.array([[size.height, size.width]], np.float32)
            ratio = np.array([[size.height / size.width]], np.float32)
            feeds["resolution"] = per_picture(sides, sample)
            feeds["aspect_ratio"] = per_picture(ratio, sample)
        return feeds
