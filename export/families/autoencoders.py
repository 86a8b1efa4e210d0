"""The autoencoder as two parts, without the scaling that the pipeline applies around it."""

from typing import Any

from torch import Tensor, nn

from fewstep.export.families.linear_attention import safe_divisors
from fewstep.export.part import Part, Port


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        with safe_divisors(self.model):
            return self.model.decode(latent_sample, return_dict=False)[0]


class _Encoder(nn.Module):
    """Mean and logarithm of the variance side by side; a tiny autoencoder gives latents."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        with safe_divisors(self.model):
            found = self.model.encode(sample)
        if hasattr(found, "latent_dist"):
            return found.latent_dist.parameters
        return found.latents if hasattr(found, "latents") else found.latent


def spatial_factor(model: Any) -> int:
    """Pixels per latent along each side."""
    if getattr(model, "spatial_compression_ratio", None):
        return int(model.spatial_compression_ratio)
    channels = getattr(model.config, "block_out_channels", None)
    channels = channels or model.config.decoder_block_out_channels
    return 2 ** (len(channels) - 1)


def latent_channels(model: Any) -> int:
    """Channels of a latent."""
    return int(model.config.latent_channels)


def autoencoder_parts(model: Any) -> tuple[Part, Part]:
    """Decoder and encoder, as `vae_decoder` and `vae_encoder`."""
    return autoencoder_ports(
        _Decoder(model),
        _Encoder(model),
        model,
        factor=spatial_factor(model),
        channels=latent_channels(model),
    )


def autoencoder_ports(
    decoder: nn.Module, encoder: nn.Module, model: Any, *, factor: int, channels: int
) -> tuple[Part, Part]:
    """Both parts around modules that decode and encode pictures.

    Args:
        decoder: Latents to pictures.
        encoder: Pictures to latents, or to a mean and a logarithm of the variance.
        model: The stock autoencoder.
        factor: Pixels per latent along each side.
        channels: Of a latent.
    """
    is_tiny = "Tiny" in type(model).__name__ or type(model).__name__ == "AutoencoderDC"
    config = {**dict(model.config), "_class_name": type(model).__name__}
    latent = ("batch_size", str(channels), "latent_height", "latent_width")
    pixels = ("batch_size", "3", f"latent_height * {factor}", f"latent_width * {factor}")
    given = str(channels if is_tiny else 2 * channels)
    small = ("batch_size", given, f"sample_height / {factor}", f"sample_width / {factor}")
    return (
        Part(
            name="vae_decoder",
            module=decoder,
            inputs=(Port("latent_sample", latent),),
            outputs=(Port("sample", pixels),),
            config=config,
            sizes={"batch_size": 2, "latent_height": 6, "latent_width": 10},
        ),
        Part(
            name="vae_encoder",
            module=encoder,
            inputs=(Port("sample", ("batch_size", "3", "sample_height", "sample_width")),),
            outputs=(Port("latent_parameters", small),),
            config=config,
            sizes={"batch_size": 2, "sample_height": 6 * factor, "sample_width": 10 * factor},
            multiples={"sample_height": factor, "sample_width": factor},
        ),
    )
