"""Tiny SD1.5, SDXL and SD3."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.tiny.parts import ddim, flow_scheduler, kl, stock


def build_sd15() -> DiffusionPipeline:
    """StableDiffusionPipeline without text encoder."""
    torch.manual_seed(0)
    unet = stock.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return stock.StableDiffusionPipeline(
        vae=kl(4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl() -> DiffusionPipeline:
    """StableDiffusionXLPipeline without text encoders."""
    torch.manual_seed(0)
    unet = stock.UNet2DConditionModel(
        block_out_channels=(2, 4),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    return stock.StableDiffusionXLPipeline(
        vae=kl(4),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=ddim(),
        add_watermarker=False,
    )


def build_sd3(channels: int = 4, layers: int = 1) -> DiffusionPipeline:
    """StableDiffusion3Pipeline without text encoders."""
    torch.manual_seed(0)
    transformer = stock.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=channels,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=channels,
    )
    missing: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3")
        + ("tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return stock.StableDiffusion3Pipeline(
        vae=kl(channels, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=transformer,
        scheduler=flow_scheduler(),
        **missing,
    )
