"""Tiny Wan 2.1 and 2.2."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.tiny.parts import flow_scheduler, stock


def _wan_transformer() -> Any:
    return stock.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _wan_vae() -> Any:
    return stock.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def build_wan21() -> DiffusionPipeline:
    """WanPipeline with one transformer."""
    torch.manual_seed(0)
    return stock.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_wan_vae(),
        scheduler=flow_scheduler(),
        transformer=_wan_transformer(),
    )


def build_wan22() -> DiffusionPipeline:
    """WanPipeline with a high-noise and a low-noise transformer."""
    torch.manual_seed(0)
    return stock.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_wan_vae(),
        scheduler=flow_scheduler(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.875,
    )


def _ltx_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = stock.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = stock.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )
    return {
        "scheduler": flow_scheduler(),
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }


def build_ltx() -> DiffusionPipeline:
    """LTXPipeline without text encoder."""
    return stock.LTXPipeline(**_ltx_parts())


def build_ltx_condition() -> DiffusionPipeline:
    """LTXConditionPipeline, which also takes latents to start from."""
    return stock.LTXConditionPipeline(**_ltx_parts())
