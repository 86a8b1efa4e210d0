"""Stable Diffusion 1.x, 2.x and XL."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fewstep.runtime.hosts.host import Condition, Host, Size, per_picture
from fewstep.runtime.manifest import Tensor

CLIP_LENGTH = 77


class StableDiffusionHost(Host):
    """One CLIP encoder, read at its last state."""

    family: ClassVar[str] = "sd15"
    denoiser: ClassVar[str] = "unet"
    denoiser_output: ClassVar[str] = "out_sample"

    def encode(self, prompts: list[str]) -> Condition:
        tokenizer = self.parts.tokenizer("tokenizer")
        ids = tokenizer.encode(prompts, tokenizer.max_length or CLIP_LENGTH)
        found = self.parts.session("text_encoder").run({"input_ids": ids}, ["last_hidden_state"])
        return {"encoder_hidden_states": found["last_hidden_state"]}

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        wanted = {tensor.name for tensor in self.manifest.graphs[self.denoiser].inputs}
        feeds = {"sample": sample, "timestep": np.array(timestep, np.float32), **condition}
        if "timestep_cond" in wanted:
            embedded = guidance_embedding(self._told_scale() - 1.0, self._embedding_width())
            feeds["timestep_cond"] = per_picture(embedded, sample)
        return feeds

    def _told_scale(self) -> float:
        guidance = self.recipe.guidance
        if guidance.mode == "none":  # what the stock pipeline says where nobody does
            return self.manifest.settings.get("untold_guidance", 1.0)
        return guidance.scale

    def _embedding_width(self) -> int:
        inputs = self.manifest.graphs[self.denoiser].inputs
        return next(int(t.dims[1]) for t in inputs if t.name == "timestep_cond")


class StableDiffusionXlHost(StableDiffusionHost):
    """Two CLIP encoders, their last but one states side by side, and the picture's size."""

    family: ClassVar[str] = "sdxl"

    def encode(self, prompts: list[str]) -> Condition:
        states, pooled = [], None
        for suffix in ("", "_2"):
            name = f"text_encoder{suffix}"
            if name not in self.manifest.graphs:
                continue
            tokenizer = self.parts.tokenizer(f"tokenizer{suffix}")
            ids = tokenizer.encode(prompts, tokenizer.max_length or CLIP_LENGTH)
            session = self.parts.session(name)
            first = session.graph.outputs[0].name
            last = last_but_one(session.graph.outputs)
            found = session.run({"input_ids": ids}, [first, last])
            states.append(found[last])
            pooled = found[first]
        assert pooled is not None
        return {"encoder_hidden_states": np.concatenate(states, axis=-1), "text_embeds": pooled}

    def unconditional(self, negative: list[str]) -> Condition:
        found = self.encode(negative)
        if self.manifest.settings.get("zeros_for_empty_prompt") and not any(negative):
            return {name: np.zeros_like(value) for name, value in found.items()}
        return found

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([[size.height, size.width, 0, 0, size.height, size.width]], np.float32)
        feeds = super().feeds(sample, timestep, condition, size)
        return {**feeds, "time_ids": per_picture(told, sample)}


def last_but_one(outputs: Sequence[Tensor]) -> str:
    """Name of the state before the last layer among a text encoder's outputs."""
    states = [t.name for t in outputs if t.name.startswith("hidden_states.")]
    return states[-2]


def guidance_embedding(scale: float, width: int) -> np.ndarray:
    """Sinusoids of a guidance scale, shape (1, width), as latent consistency models are told it."""
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * -np.float32(math.log(10000.0) / (half - 1)))
    angles = np.float32(scale * 1000.0) * rates[None]
    found = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(found, ((0, 0), (0, width % 2))).astype(np.float32)
