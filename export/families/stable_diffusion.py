"""Stable Diffusion 1.x, 2.x and XL: a UNet."""

from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.export.families.autoencoders import autoencoder_parts, spatial_factor
from fewstep.export.families.family import (
    ExportFamily,
    autoencoder_settings,
    square,
    stock_default,
)
from fewstep.export.families.text_encoders import clip_part
from fewstep.export.part import Part, Port


class _Unet(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _GuidedUnet(_Unet):
    """Told its guidance scale, embedded (latent consistency models)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        return self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]


class _UnetXl(_Unet):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]


class _GuidedUnetXl(_Unet):
    """Both (a latent consistency model on SDXL)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]


def unet_part(model: Any) -> Part:
    """A UNet with the inputs its configuration asks for."""
    config = model.config
    down = 2 ** (len(config.block_out_channels) - 1)
    inputs = [
        Port("sample", ("batch_size", str(config.in_channels), "height", "width")),
        Port("timestep"),
        Port(
            "encoder_hidden_states",
            ("batch_size", "sequence_length", str(config.cross_attention_dim)),
        ),
    ]
    is_guided = config.time_cond_proj_dim is not None
    wrapper: type[nn.Module] = _GuidedUnet if is_guided else _Unet
    if config.addition_embed_type == "text_time":
        wrapper = _GuidedUnetXl if is_guided else _UnetXl
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs += [
            Port("text_embeds", ("batch_size", str(width))),
            Port("time_ids", ("batch_size", "6")),
        ]
    if is_guided:
        inputs.append(Port("timestep_cond", ("batch_size", str(config.time_cond_proj_dim))))
    return Part(
        name="unet",
        module=wrapper(model),
        inputs=tuple(inputs),
        outputs=(Port("out_sample", ("batch_size", str(config.out_channels), "height", "width")),),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={"batch_size": 2, "height": 4 * down, "width": 6 * down, "sequence_length": 11},
        multiples={"height": down, "width": down},
    )


class StableDiffusion(ExportFamily):
    """SD 1.x and 2.x, and latent consistency models on them."""

    name: ClassVar[str] = "sd15"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
    )
    denoiser: ClassVar[str] = "unet"

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        text = clip_part("text_encoder", pipe.text_encoder, has_states=False)
        return (text, unet_part(pipe.unet), *autoencoder_parts(pipe.vae))

    def settings(self, pipe: Any) -> dict[str, float]:
        found = {
            **autoencoder_settings(pipe.vae, spatial_factor(pipe.vae)),
            "sample_size": square(pipe.unet.config.sample_size),
        }
        if type(pipe).__name__ == "LatentConsistencyModelPipeline":
            found["untold_guidance"] = stock_default(pipe, "guidance_scale")
        return found


class StableDiffusionXl(ExportFamily):
    """SDXL: two CLIP encoders, their last but one states side by side."""

    name: ClassVar[str] = "sdxl"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    denoiser: ClassVar[str] = "unet"

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        encoders = [
            clip_part(name, getattr(pipe, name), has_states=True)
            for name in ("text_encoder", "text_encoder_2")
            if getattr(pipe, name) is not None
        ]
        return (*encoders, unet_part(pipe.unet), *autoencoder_parts(pipe.vae))

    def settings(self, pipe: Any) -> dict[str, float]:
        zeroed = float(pipe.config.force_zeros_for_empty_prompt)
        known = autoencoder_settings(pipe.vae, spatial_factor(pipe.vae))
        return {
            **known,
            "sample_size": square(pipe.unet.config.sample_size),
            "zeros_for_empty_prompt": zeroed,
        }
