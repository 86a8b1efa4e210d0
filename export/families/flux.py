"""FLUX.1: dev (told its guidance scale) and schnell, on packed latents."""

from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.export.families.autoencoders import autoencoder_parts, spatial_factor
from fewstep.export.families.family import ExportFamily, autoencoder_settings, part_of
from fewstep.export.families.joint_attention import JointAttention
from fewstep.export.families.rotary import Angles, angles_of, rates
from fewstep.export.families.stand_ins import processors, standing_in
from fewstep.export.families.text_encoders import clip_part, t5_part
from fewstep.export.part import Part, Port


class _Transformer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        stock = model.pos_embed
        self.rates = [rates(width, stock.theta).float() for width in stock.axes_dim]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
    ) -> Tensor:
        return self._answer(
            hidden_states,
            timestep,
            None,
            pooled_projections,
            encoder_hidden_states,
            txt_ids,
            img_ids,
        )

    def _answer(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
    ) -> Tensor:
        blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        attentions = [block.attn for block in blocks]
        places = standing_in(self.model.pos_embed, self._angles)
        with places, processors(attentions, JointAttention()):
            return self.model(
                hidden_states=hidden_states,
                timestep=timestep.expand(hidden_states.shape[0]),
                guidance=guidance,
                pooled_projections=pooled_projections,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=txt_ids,
                img_ids=img_ids,
                return_dict=False,
            )[0]

    def _angles(self, ids: Tensor) -> Angles:
        return angles_of(ids.float(), self.rates)


class _GuidedTransformer(_Transformer):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
    ) -> Tensor:
        return self._answer(
            hidden_states,
            timestep,
            guidance,
            pooled_projections,
            encoder_hidden_states,
            txt_ids,
            img_ids,
        )


def flux_transformer_part(name: str, model: Any) -> Part:
    """The transformer; its timestep is the schedule's over 1000, as stock pipelines tell it."""
    config = model.config
    guided = config.guidance_embeds
    packed = ("batch_size", "packed_height_width", str(config.in_channels))
    guidance = (Port("guidance", ("batch_size",)),) if guided else ()
    return Part(
        name=name,
        module=_GuidedTransformer(model) if guided else _Transformer(model),
        inputs=(
            Port("hidden_states", packed),
            Port("timestep", ("1",)),
            *guidance,
            Port("pooled_projections", ("batch_size", str(config.pooled_projection_dim))),
            Port(
                "encoder_hidden_states",
                ("batch_size", "sequence_length", str(config.joint_attention_dim)),
            ),
            # float32 in every precision: half precision cannot hold the angles
            Port("txt_ids", ("sequence_length", "3"), "float32"),
            Port("img_ids", ("packed_height_width", "3"), "float32"),
        ),
        outputs=(Port("out_hidden_states", packed),),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={"batch_size": 2, "packed_height_width": 24, "sequence_length": 11},
        timestep=0.5,
    )


class Flux(ExportFamily):
    """CLIP's pooled state and T5's tokens."""

    name: ClassVar[str] = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        return (
            clip_part("text_encoder", part_of(pipe, "text_encoder"), has_states=False),
            t5_part("text_encoder_2", part_of(pipe, "text_encoder_2")),
            flux_transformer_part("transformer", pipe.transformer),
            *autoencoder_parts(pipe.vae),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        return {
            **autoencoder_settings(pipe.vae, spatial_factor(pipe.vae)),
            "sample_size": pipe.default_sample_size,
            "patch_size": 2,
            "tokenizer_max_length": pipe.tokenizer_max_length,
        }
