"""Tiny FLUX.2-klein and SANA-Sprint: families that exist only as distilled models."""

import torch
from diffusers import DiffusionPipeline

from tests.tiny.family import TinyFamily, embeds
from tests.tiny.parts import flow_scheduler, stock
from tests.tiny.transformers import build_dc_autoencoder


def build_flux2_klein() -> DiffusionPipeline:
    """Flux2KleinPipeline without text encoder."""
    torch.manual_seed(0)
    transformer = stock.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = stock.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=32,
    )
    return stock.Flux2KleinPipeline(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        is_distilled=True,
    )


def build_sana_sprint() -> DiffusionPipeline:
    """SanaSprintPipeline with the scheduler its authors ship, SCMScheduler."""
    torch.manual_seed(0)
    transformer = stock.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    return stock.SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=build_dc_autoencoder(),
        transformer=transformer,
        scheduler=stock.SCMScheduler(),
    )


FLUX2_KLEIN = TinyFamily(
    "flux2-klein",
    "flux2",
    build_flux2_klein,
    lambda batch: {
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "prompt_embeds": embeds(batch, 6, 16),
    },
    (16, 8, 8),
    clock=lambda told: 1000.0 * told,
)
SANA_SPRINT = TinyFamily(
    "sana-sprint",
    "sana-sprint",
    build_sana_sprint,
    lambda batch: {
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "prompt_embeds": embeds(batch, 6, 8),
        "prompt_attention_mask": torch.ones(batch, 6),
        "use_resolution_binning": False,
    },
    (4, 16, 16),
)
