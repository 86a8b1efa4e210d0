"""A random Stable Diffusion pipeline of SD 1.5's size with the digits tokenizer and a recipe."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.digits.weights import teacher_folder
from fewstep.recipe import SIDECAR_NAME, Base, FewStepRecipe, Grid, Sampler, Schedule

SIDE = 32
"""Latents per side: 256 pixels."""


def save_sd15_size(folder: Path) -> None:
    """Write the pipeline: UNet of 860 million weights, autoencoder of 84, text encoder of 123."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE, cross_attention_dim=768, attention_head_dim=8, in_channels=4
    )
    blocks = ("DownEncoderBlock2D",) * 4
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=blocks,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    tokenizer = CLIPTokenizer.from_pretrained(teacher_folder("sd15") / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        vocab_size=49408,
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    tokenizer.model_max_length = 77
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    (folder / SIDECAR_NAME).write_text(recipe().to_json(), encoding="utf-8")


def recipe() -> FewStepRecipe:
    """Four deterministic steps."""
    schedule = Schedule(kind="vp", beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012)
    timesteps = (999.0, 749.0, 499.0, 249.0)
    sigmas = (*(schedule.build().sigma_of_timestep(t) for t in timesteps), 0.0)
    return FewStepRecipe(
        base=Base(family="sd15", prediction="epsilon", schedule=schedule),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=4,
        sampler=Sampler(stochasticity=0.0),
    )
