"""Wan 2.1 and 2.2, text to video."""

import html
import re
from collections.abc import Callable
from typing import ClassVar, NoReturn

import numpy as np

from fewstep.errors import RuntimeSettingError
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.hosts.host import Condition, Host, Parts, Size, cast
from fewstep.runtime.manifest import Manifest

PIECE = 1
"""Latent frames that are decoded at once: the fewest, as in the stock autoencoder."""


class WanHost(Host):
    """UMT5's tokens without those of the padding, and a decoder that remembers.

    Prompts lose superfluous white space and HTML entities, as in stock pipelines without ftfy.
    """

    family: ClassVar[str] = "wan"

    def __init__(self, manifest: Manifest, recipe: FewStepRecipe, parts: Parts) -> None:
        super().__init__(manifest, recipe, parts)
        self.times = int(manifest.settings["vae_scale_factor_temporal"])
        if f"{self.denoiser}_2" in manifest.graphs and not manifest.experts:
            raise RuntimeSettingError(
                "this Wan has two transformers and its recipe does not say which steps are whose; "
                "export it with an adapter or a recipe that has experts"
            )

    def encode(self, prompts: list[str]) -> Condition:
        stock = int(self.manifest.settings["max_sequence_length"])
        length = self.recipe.base.max_sequence_length or stock
        plain = [cleaned(prompt) for prompt in prompts]
        ids, mask = self.parts.tokenizer("tokenizer").encode_with_mask(plain, length)
        session = self.parts.session("text_encoder")
        found = session.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        return {"encoder_hidden_states": found * mask[..., None].astype(found.dtype)}

    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        told = np.array([timestep], np.float32)
        return {"hidden_states": sample, "timestep": told, **condition}

    @property
    def default_size(self) -> Size:
        height, width, frames = (
            int(self.manifest.settings[name]) for name in ("height", "width", "num_frames")
        )
        return Size(height, width, frames)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, f, h, w) of one clip; the first latent frame is a single picture."""
        channels, height, width = super().latent_shape(size)
        return (channels, (_frames(size) - 1) // self.times + 1, height, width)

    def check_size(self, size: Size) -> None:
        super().check_size(Size(size.height, size.width))
        frames = _frames(size)
        if frames < 1 or (frames - 1) % self.times:
            near = max(round((frames - 1) / self.times), 0) * self.times + 1
            raise RuntimeSettingError(
                f"frames is {frames}, and a clip has one more than a multiple of {self.times}; the "
                f"nearest is {near}"
            )

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Clips of latents (B, C, f, h, w): float32, shape (B, 3, F, H, W), -1 to 1."""
        session = self.parts.session("vae_decoder")
        state = self._nothing_seen(latents)
        found = []
        for start in range(0, latents.shape[2], PIECE):
            piece = cast(latents[:, :, start : start + PIECE], session, "latent_sample")
            answer = session.run({"latent_sample": piece, "state": cast(state, session, "state")})
            state = answer["next_state"]
            found.append(answer["sample"].astype(np.float32, copy=False))
        return np.concatenate(found, axis=2)[:, :, self.times - 1 :]

    def _nothing_seen(self, latents: np.ndarray) -> np.ndarray:
        inputs = self.manifest.graphs["vae_decoder"].inputs
        channels = next(int(tensor.dims[1]) for tensor in inputs if tensor.name == "state")
        batch, _, _, height, width = latents.shape
        return np.zeros((batch, channels, height, width), np.float32)

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """The first picture of each clip, which needs none of the others."""
        return self.decode(latents[:, :, :1])[:, :, 0]

    def encode_image(self, image: np.ndarray, draw: Callable[..., np.ndarray]) -> NoReturn:
        del image, draw
        raise RuntimeSettingError(
            "image was given, and this folder makes clips from text alone; leave it out"
        )


def cleaned(prompt: str) -> str:
    """A prompt as stock pipelines tokenize it where ftfy is not installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


def _frames(size: Size) -> int:
    assert size.frames is not None
    return size.frames
