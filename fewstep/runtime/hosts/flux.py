"""FLUX.1 dev and schnell."""

from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size, per_picture
from fewstep.runtime.hosts.packing import PATCH, pack, unpack

T5_LENGTH = 512
STOCK_GUIDANCE = 3.5
"""What the stock pipeline tells the network beside true guidance, where nobody says otherwise."""


class FluxHost(Host):
    """CLIP's pooled state, T5's tokens, and the places of both kinds of tokens."""

    family: ClassVar[str] = "flux"
    no_negative: ClassVar[str] = " "

    def encode(self, prompts: list[str]) -> Condition:
        short = int(self.manifest.settings["tokenizer_max_length"])
        ids = self.parts.tokenizer("tokenizer").encode(prompts, short)
        clip = self.parts.session("text_encoder").run({"input_ids": ids}, ["pooler_output"])
        long = self.recipe.base.max_sequence_length or T5_LENGTH
        ids = self.parts.tokenizer("tokenizer_2").encode(prompts, long)
        t5 = self.parts.session("text_encoder_2").run({"input_ids": ids})
        return {
            "encoder_hidden_states": t5["last_hidden_state"],
            "pooled_projections": clip["pooler_output"],
        }

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        height, width = self.latent_shape(size)[1:]
        length = condition["encoder_hidden_states"].shape[1]
        feeds = {
            "hidden_states": pack(sample),
            "timestep": np.array([timestep / 1000.0], np.float32),
            "txt_ids": np.zeros((length, 3), np.float32),
            "img_ids": places(height // PATCH, width // PATCH),
            **condition,
        }
        if any(tensor.name == "guidance" for tensor in self.manifest.graphs[self.denoiser].inputs):
            feeds["guidance"] = per_picture(np.array([self._told_guidance()], np.float32), sample)
        return feeds

    def _told_guidance(self) -> float:
        guidance = self.recipe.guidance
        told = {"embedded": guidance.scale, "none": 1.0}
        return told.get(guidance.mode, STOCK_GUIDANCE)

    def answer(self, output: np.ndarray, size: Size) -> np.ndarray:
        height, width = self.latent_shape(size)[1:]
        return unpack(output, height, width)

    @property
    def size_multiple(self) -> int:
        return self.factor * PATCH


def places(rows: int, columns: int) -> np.ndarray:
    """(0, row, column) of every token, row by row, float32, shape (rows * columns, 3)."""
    grid = np.zeros((rows, columns, 3), np.float32)
    grid[..., 1] = np.arange(rows, dtype=np.float32)[:, None]
    grid[..., 2] = np.arange(columns, dtype=np.float32)[None]
    return grid.reshape(-1, 3)
