"""Sizes of latents, and the 2x2 packing that some transformers read them in."""

from dataclasses import dataclass

from torch import Tensor

from fewstep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentLayout:
    """How big a family's latents are.

    Attributes:
        channels: Of the latents, before any packing.
        height: The model's own height in latent pixels, what it is for without being asked.
        width: The same across.
        factor: Image pixels per latent pixel and side.
        patch: Latent pixels per token and side.
        frames: The model's own length in latent frames; 0 for images.
        frame_factor: Video frames per latent frame (the first latent frame is one frame alone).
    """

    channels: int
    height: int
    width: int
    factor: int
    patch: int = 1
    frames: int = 0
    frame_factor: int = 1

    @property
    def num_tokens(self) -> int:
        """Image tokens of one frame at the model's own size."""
        return (self.height // self.patch) * (self.width // self.patch)

    def shape(self, height_px: int = 0, width_px: int = 0, num_frames: int = 0) -> tuple[int, ...]:
        """Latent shape of one picture or clip, (C, h, w) or (C, frames, h, w).

        Args:
            height_px: 0 is the model's own height, and its own width with it.
            width_px: 0 is a square picture, or the model's own width where height_px is 0 too.
            num_frames: 0 is the model's own length.

        Raises:
            ConfigError: No such size exists for this model.
        """
        height = self._side(height_px, "height") if height_px else self.height
        width = self._side(width_px, "width") if width_px else height if height_px else self.width
        if not self.frames:
            if num_frames:
                raise ConfigError(
                    f"got {num_frames} frames for a model of still images; leave num_frames at 0"
                )
            return (self.channels, height, width)
        return (self.channels, self._length(num_frames), height, width)

    def _side(self, pixels: int, name: str) -> int:
        multiple = self.factor * self.patch
        if pixels < multiple or pixels % multiple:
            raise ConfigError(
                f"{name} is {pixels} px, but this model needs a multiple of {multiple}; "
                f"use {max(1, round(pixels / multiple)) * multiple}"
            )
        return pixels // self.factor

    def _length(self, num_frames: int) -> int:
        if not num_frames:
            return self.frames
        parts, rest = divmod(num_frames - 1, self.frame_factor)
        if num_frames < 1 or rest:
            raise ConfigError(
                f"got {num_frames} frames, but this model needs a multiple of {self.frame_factor} "
                f"and one more; use {max(0, parts) * self.frame_factor + 1}"
            )
        return parts + 1


def pack(latents: Tensor) -> Tensor:
    """2x2 patches as tokens: (B, C, h, w) -> (B, h/2 * w/2, 4 C), as FLUX and Qwen-Image read."""
    batch_size, channels, height, width = latents.shape
    patches = latents.reshape(batch_size, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`: (B, h/2 * w/2, 4 C) -> (B, C, h, w)."""
    batch_size, _, size = tokens.shape
    patches = tokens.reshape(batch_size, height // 2, width // 2, size // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, size // 4, height, width)
