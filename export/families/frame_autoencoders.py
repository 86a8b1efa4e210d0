"""Video autoencoders used for one frame, with the mean and deviation of every latent channel."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.families.autoencoders import autoencoder_ports
from fewstep.export.part import Part


class _Statistics(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for name, values in (
            ("mean", model.config.latents_mean),
            ("deviation", model.config.latents_std),
        ):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None])


class _Decoder(_Statistics):
    def forward(self, latent_sample: Tensor) -> Tensor:
        latents = latent_sample * self.deviation.to(latent_sample.dtype)
        latents = latents + self.mean.to(latent_sample.dtype)
        return self.model.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]


class _Encoder(_Statistics):
    """The distribution of the latents the network sees, not of the autoencoder's own."""

    def forward(self, sample: Tensor) -> Tensor:
        found = self.model.encode(sample[:, :, None]).latent_dist.parameters[:, :, 0]
        mean, logvar = found.chunk(2, dim=1)
        deviation = self.deviation.to(found.dtype)
        scaled = (mean - self.mean.to(found.dtype)) / deviation
        return torch.cat([scaled, logvar - 2.0 * deviation.log()], dim=1)


def frame_autoencoder_parts(model: Any, factor: int) -> tuple[Part, Part]:
    """Decoder and encoder of single pictures.

    Args:
        model: AutoencoderKLQwenImage.
        factor: Pixels per latent along each side.
    """
    return autoencoder_ports(
        _Decoder(model), _Encoder(model), model, factor=factor, channels=model.config.z_dim
    )
