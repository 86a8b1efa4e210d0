"""Stable Diffusion 3 and 3.5."""

from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.export.families.autoencoders import autoencoder_parts, spatial_factor
from fewstep.export.families.family import ExportFamily, autoencoder_settings, square
from fewstep.export.families.text_encoders import clip_part, t5_part
from fewstep.export.part import Part, Port


class _Transformer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        return self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep.expand(hidden_states.shape[0]),
            return_dict=False,
        )[0]


def sd3_transformer_part(name: str, model: Any) -> Part:
    """The multimodal transformer; every picture of a batch is at the same timestep."""
    config = model.config
    patch, channels = config.patch_size, config.in_channels
    return Part(
        name=name,
        module=_Transformer(model),
        inputs=(
            Port("hidden_states", ("batch_size", str(channels), "height", "width")),
            Port(
                "encoder_hidden_states",
                ("batch_size", "sequence_length", str(config.joint_attention_dim)),
            ),
            Port("pooled_projections", ("batch_size", str(config.pooled_projection_dim))),
            Port("timestep", ("1",)),
        ),
        outputs=(
            Port("out_hidden_states", ("batch_size", str(config.out_channels), "height", "width")),
        ),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={
            "batch_size": 2,
            "height": 4 * patch,
            "width": 6 * patch,
            "sequence_length": 11,
        },
        multiples={"height": patch, "width": patch},
    )


class StableDiffusion3(ExportFamily):
    """Two CLIP encoders and, unless dropped, T5."""

    name: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        encoders = [
            clip_part(name, getattr(pipe, name), has_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        if pipe.text_encoder_3 is not None:
            encoders.append(t5_part("text_encoder_3", pipe.text_encoder_3))
        denoiser = sd3_transformer_part("transformer", pipe.transformer)
        return (*encoders, denoiser, *autoencoder_parts(pipe.vae))

    def settings(self, pipe: Any) -> dict[str, float]:
        config, factor = pipe.transformer.config, spatial_factor(pipe.vae)
        return {
            **autoencoder_settings(pipe.vae, factor),
            "sample_size": square(config.sample_size),
            "patch_size": config.patch_size,
            **_largest_side(config, factor),
            "joint_attention_dim": config.joint_attention_dim,
            "tokenizer_max_length": pipe.tokenizer_max_length,
        }


def _largest_side(config: Any, factor: int) -> dict[str, float]:
    """In pixels: every size is cut from the middle of one table of places, where there is one."""
    if config.pos_embed_max_size is None:
        return {}
    return {"largest_side": config.pos_embed_max_size * config.patch_size * factor}
