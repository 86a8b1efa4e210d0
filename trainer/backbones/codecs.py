"""Latents to pictures and back, in the scale that a family's denoiser works in.

A codec is arithmetic around a stock autoencoder; it holds nothing.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor


class Codec(ABC):
    """Interface: what stands between a denoiser and its autoencoder."""

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures of latents.

        Args:
            vae: The pipeline's autoencoder.
            latents: Shape (B, C, h, w) or (B, C, frames, h, w), in the denoiser's scale.

        Returns:
            About -1 to 1, shape (B, 3, H, W) or (B, 3, frames, H, W); differentiable.
        """

    @abstractmethod
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Latents of pictures: the mean, not a sample.

        Args:
            vae: The pipeline's autoencoder.
            images: Shape (B, 3, H, W) or (B, 3, frames, H, W), -1 to 1.

        Returns:
            Latents in the denoiser's scale, float32.
        """


@final
class ImageCodec(Codec):
    """Image autoencoders: one scaling factor, and a shift (SD3, FLUX) where the config has one.

    latents = (encoded - shift) * scaling_factor

    Fine-tunes of SDXL may give a mean and a deviation per channel instead of the shift.
    """

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latents)
        encoded = latents.float() * std / vae.config.scaling_factor + mean
        return vae.decode(encoded.to(vae.dtype), return_dict=False)[0]

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        encoded = _encoded(vae, images)
        mean, std = self._statistics(vae, encoded)
        return (encoded - mean) * vae.config.scaling_factor / std

    def _statistics(self, vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            return _per_channel(mean, latents), _per_channel(std, latents)
        return vae.config.get("shift_factor") or 0.0, 1.0


@final
class VideoCodec(Codec):
    """Video autoencoders with a mean and a deviation per channel (Wan, Qwen-Image).

    latents = (encoded - mean) / std

    Still images, (B, C, h, w), pass as clips of one frame.
    """

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        is_still = latents.ndim == 4
        clips = latents.float().unsqueeze(2) if is_still else latents.float()
        mean = _per_channel(vae.config.latents_mean, clips)
        std = _per_channel(vae.config.latents_std, clips)
        decoded = vae.decode((clips * std + mean).to(vae.dtype), return_dict=False)[0]
        return decoded[:, :, 0] if is_still else decoded

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        is_still = images.ndim == 4
        encoded = _encoded(vae, images.unsqueeze(2) if is_still else images)
        mean = _per_channel(vae.config.latents_mean, encoded)
        latents = (encoded - mean) / _per_channel(vae.config.latents_std, encoded)
        return latents[:, :, 0] if is_still else latents


def _encoded(vae: Any, images: Tensor) -> Tensor:
    found = vae.encode(images.to(vae.device, vae.dtype), return_dict=False)[0]
    return (found if isinstance(found, Tensor) else found.mean).float()  # Tiny and DC have no mean


def _per_channel(values: list[float], latents: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return torch.tensor(values, device=latents.device).reshape(shape)
