"""Tiny FLUX, PixArt, Sana, Qwen-Image and Z-Image."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.tiny.parts import ddim, flow_scheduler, kl, stock


def build_flux() -> DiffusionPipeline:
    """FluxPipeline without text encoders."""
    torch.manual_seed(0)
    transformer = stock.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    missing: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    )
    return stock.FluxPipeline(
        vae=kl(1, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=transformer,
        scheduler=flow_scheduler(),
        **missing,
    )


def build_pixart() -> DiffusionPipeline:
    """PixArtAlphaPipeline; its denoiser also gives a learned variance."""
    torch.manual_seed(0)
    transformer = stock.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return stock.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=kl(4),
        transformer=transformer,
        scheduler=ddim(),
    )


def build_dc_autoencoder() -> Any:
    """Sana's kind of autoencoder, halving the picture once."""
    return stock.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def build_sana() -> DiffusionPipeline:
    """SanaPipeline without text encoder."""
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
    )
    return stock.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=build_dc_autoencoder(),
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def build_qwen_image() -> DiffusionPipeline:
    """QwenImagePipeline without text encoder."""
    torch.manual_seed(0)
    transformer = stock.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = stock.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return stock.QwenImagePipeline(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def build_z_image() -> DiffusionPipeline:
    """ZImagePipeline without text encoder."""
    torch.manual_seed(0)
    transformer = stock.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # diffusers leaves the pad tokens uninitialised
        transformer.x_pad_token.fill_(0.1)
        transformer.cap_pad_token.fill_(0.1)
    return stock.ZImagePipeline(
        scheduler=flow_scheduler(),
        vae=kl(16, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
