"""The autoencoder of an export as ComfyUI's VAE. torch; ComfyUI only where tiles are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.runtime.hosts.host import cast


class EngineVae:
    """What ComfyUI's nodes ask of a VAE, answered by an engine.

    Latents are unscaled, as everywhere in ComfyUI: MODEL scales them on its way in and out.

    Args:
        engine: With vae_decoder and, for encoding, vae_encoder.
    """

    latent_dim = 2
    output_channels = 3

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.latent_channels = engine.host.channels
        self.upscale_ratio = self.downscale_ratio = engine.host.factor

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """Pictures of latents (B, C, h, w): shape (B, H, W, 3), 0 to 1, on the CPU."""
        del vae_options
        return _unit(_each(self._decoded, samples_in)).movedim(1, -1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents of pictures (B, H, W, 3 or 4), cut to whole latents; the distribution's mean."""
        return _each(self._encoded, self._cut(pixel_samples))

    def decode_tiled(
        self,
        samples: Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:
        """As `decode`, in tiles of so many latents."""
        del tile_t, overlap_t
        tiles = (tile_x or 64, tile_y or 64, 16 if overlap is None else overlap)
        factor = self._engine.host.factor
        return _unit(_tiled(self._decoded, samples, tiles, factor, 3)).movedim(1, -1)

    def encode_tiled(
        self,
        pixel_samples: Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:
        """As `encode`, in tiles of so many pixels."""
        del tile_t, overlap_t
        tiles = (tile_x or 512, tile_y or 512, 64 if overlap is None else overlap)
        factor = 1.0 / self._engine.host.factor
        pixels = self._cut(pixel_samples)
        return _tiled(self._encoded, pixels, tiles, factor, self.latent_channels)

    def spacial_compression_decode(self) -> int:
        """Pixels per latent along each side; spelt as ComfyUI spells it."""
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        """Pixels per latent along each side."""
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        """Pictures have no frames."""

    def throw_exception_if_invalid(self) -> None:
        """It is valid: graphs are checked when the folder is opened."""

    def get_ram_usage(self) -> int:
        """Torch holds nothing of it."""
        return 0

    def _decoded(self, latents: Tensor) -> Tensor:
        session = self._engine.session("vae_decoder")
        feeds = {"latent_sample": cast(_array(latents), session, "latent_sample")}
        return _tensor(session.run(feeds, ["sample"])["sample"])

    def _encoded(self, pixels: Tensor) -> Tensor:
        session = self._engine.session("vae_encoder")
        feeds = {"sample": cast(_array(2.0 * pixels - 1.0), session, "sample")}
        found = session.run(feeds, ["latent_parameters"])["latent_parameters"]
        return _tensor(found[:, : self.latent_channels])

    def _cut(self, pixels: Tensor) -> Tensor:
        """The middle of pictures, (B, 3, H, W), sides whole latents."""
        for axis in (1, 2):
            side = pixels.shape[axis]
            kept = side - side % self.downscale_ratio
            pixels = pixels.narrow(axis, (side - kept) // 2, kept)
        return pixels[..., : self.output_channels].movedim(-1, 1)


def _each(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """One after another: memory does not grow with the batch."""
    return torch.cat([run(batch[index : index + 1]) for index in range(len(batch))])


def _tiled(
    run: Callable[[Tensor], Tensor],
    batch: Tensor,
    tiles: tuple[int, int, int],
    factor: float,
    channels: int,
) -> Tensor:
    """ComfyUI's tiling: width, height and overlap of a tile in units of what is put in."""
    from comfy.utils import tiled_scale  # pyright: ignore[reportMissingImports]

    width, height, overlap = tiles
    return tiled_scale(
        batch, run, width, height, overlap, upscale_amount=factor, out_channels=channels
    )


def _unit(pictures: Tensor) -> Tensor:
    return (pictures * 0.5 + 0.5).clamp(0.0, 1.0)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value, np.float32))
