"""Qwen-Image: a vision language model reads the prompt, a video autoencoder draws one frame."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fewstep.errors import ExportError
from fewstep.export.families.family import MASKED, ExportFamily, part_of, stock_default
from fewstep.export.families.frame_autoencoders import frame_autoencoder_parts
from fewstep.export.families.joint_attention import JointAttention
from fewstep.export.families.language_models import language_model_part
from fewstep.export.families.rotary import Angles, angles_of, rates
from fewstep.export.families.stand_ins import processors
from fewstep.export.part import Part, Port

PATCH = 2


class _Transformer(nn.Module):
    """On unpacked latents: packing and the places of all tokens are part of the graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        stock = model.pos_embed
        self.rates = [rates(width, stock.theta).float() for width in stock.axes_dim]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        model = self.model
        latents = pixel_unshuffle(hidden_states, PATCH)
        rows, columns = latents.shape[-2:]
        picture = model.img_in(latents.flatten(2).transpose(1, 2))
        text = model.txt_in(model.txt_norm(encoder_hidden_states))
        told = model.time_text_embed(timestep.expand(picture.shape[0]), picture)
        shared = {
            "temb": told,
            "encoder_hidden_states_mask": encoder_hidden_states_mask > 0,
            "image_rotary_emb": self._angles(rows, columns, text.shape[1]),
        }
        with processors([block.attn for block in model.transformer_blocks], JointAttention()):
            for block in model.transformer_blocks:
                text, picture = block(hidden_states=picture, encoder_hidden_states=text, **shared)
        found = model.proj_out(model.norm_out(picture, told))
        grid = found.transpose(1, 2).unflatten(2, (rows, columns))
        return pixel_shuffle(grid, PATCH)

    def _angles(self, rows: int, columns: int, length: int) -> Angles:
        """Places count from the picture's middle; the text's follow on all three axes."""
        down = torch.arange(rows, dtype=torch.float32) - (rows - rows // 2)
        across = torch.arange(columns, dtype=torch.float32) - (columns - columns // 2)
        first = torch.maximum(down[-1], across[-1]) + 1.0
        text = (torch.arange(length, dtype=torch.float32) + first)[:, None].expand(-1, 3)
        down = down[:, None].expand(-1, columns).flatten()
        across = across[None].expand(rows, -1).flatten()
        picture = torch.stack([torch.zeros_like(down), down, across], dim=-1)
        return angles_of(torch.cat([text, picture]), self.rates)


def qwen_transformer_part(name: str, model: Any) -> Part:
    """The transformer; its timestep is the schedule's over 1000.

    Raises:
        ExportError: A variant for editing or layers, whose further inputs no few-step host gives.
    """
    config = model.config
    if config.guidance_embeds or config.zero_cond_t or config.use_additional_t_cond:
        raise ExportError(
            "this Qwen-Image transformer reads more than text and latents, which is not exported; "
            "use the pipeline"
        )
    latent = ("batch_size", str(config.out_channels), "height", "width")
    return Part(
        name=name,
        module=_Transformer(model),
        inputs=(
            Port("hidden_states", latent),
            Port(
                "encoder_hidden_states",
                ("batch_size", "sequence_length", str(config.joint_attention_dim)),
            ),
            Port("encoder_hidden_states_mask", ("batch_size", "sequence_length"), "int64"),
            Port("timestep", ("1",)),
        ),
        outputs=(Port("out_hidden_states", latent),),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={"batch_size": 2, "height": 8, "width": 12, "sequence_length": 11},
        multiples={"height": PATCH, "width": PATCH},
        timestep=0.5,
    )


class QwenImage(ExportFamily):
    """Prompts in a template, of which the network does not see the beginning's states."""

    name: ClassVar[str] = "qwen-image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    not_fused: ClassVar[str] = MASKED

    def parts(self, pipe: Any) -> tuple[Part, ...]:
        encoder = part_of(pipe, "text_encoder")
        language = encoder.model.language_model
        return (
            language_model_part("text_encoder", language, layer=-1, config=encoder.config),
            qwen_transformer_part("transformer", pipe.transformer),
            *frame_autoencoder_parts(pipe.vae, pipe.vae_scale_factor),
        )

    def settings(self, pipe: Any) -> dict[str, float]:
        return {
            "vae_scale_factor": pipe.vae_scale_factor,
            "latent_channels": pipe.vae.config.z_dim,
            "scaling_factor": 1.0,  # a mean and a deviation per channel are in the graphs
            "shift_factor": 0.0,
            "sample_size": pipe.default_sample_size,
            "patch_size": PATCH,
            "max_sequence_length": stock_default(pipe, "max_sequence_length"),
            "dropped_tokens": pipe.prompt_template_encode_start_idx,
        }

    def texts(self, pipe: Any) -> dict[str, str]:
        before, _, after = pipe.prompt_template_encode.partition("{}")
        return {"before": before, "after": after}
