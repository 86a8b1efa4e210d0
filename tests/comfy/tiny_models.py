"""Tiny models with random weights, twice: as files ComfyUI takes for the real thing, and as stock
diffusers pipelines with the very same weights.

Each is the smallest that ComfyUI's detection still recognises; nothing is downloaded.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.recipe import FewStepRecipe, Schedule
from tests.comfy.tiny_names import pixart_names, unet_names, wan_names
from tests.tiny.parts import ddim, flow_scheduler, stock
from tests.tiny.recipes import flow_recipe, vp_recipe

PIXEL_SIZE = 64
"""Height and width of the pictures, but for PixArt."""


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model on both sides.

    Attributes:
        name: What tests and the parity table call it.
        family: The family as recipes spell it.
        network: Makes the diffusers network, seeded.
        native: ComfyUI's weights for a diffusers network's.
        wrap: Makes the stock pipeline around a network.
        latent_shape: One image's latents.
        empty_latent: ComfyUI's node of empty latents, and its inputs.
        conditioning: Inputs of FewStepTestConditioning.
        call: A prompt's embeddings as the stock pipeline's call takes them.
        recipe: Makes a four-step recipe.
        latent_format: ComfyUI's class for the scale of its latents.
        component: The pipeline's denoiser.
        pixels: Height and width of the picture.
    """

    name: str
    family: str
    network: Callable[[], nn.Module]
    native: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    wrap: Callable[[nn.Module], DiffusionPipeline]
    latent_shape: tuple[int, ...]
    empty_latent: tuple[str, dict[str, Any]]
    conditioning: dict[str, int]
    call: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    recipe: Callable[..., FewStepRecipe]
    latent_format: str
    component: str = "transformer"
    pixels: int = PIXEL_SIZE

    @property
    def is_flow(self) -> bool:
        """Whether it is of the flow kind; else variance preserving."""
        return self.recipe(self.family).base.schedule.kind == "flow"

    @property
    def file(self) -> str:
        """Its name in diffusion_models/."""
        return f"tiny-{self.name}.safetensors"

    def save(self, folder: Path) -> str:
        """Write it into diffusion_models/ of a folder, unless it is there.

        Returns:
            The name for UNETLoader.
        """
        path = folder / "diffusion_models" / self.file
        if not path.exists():
            weights = self.native(built(self).state_dict())
            save_file({name: value.contiguous() for name, value in weights.items()}, path)
        return self.file

    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline with these weights, as new."""
        pipe = self.wrap(copy.deepcopy(built(self)))
        pipe.set_progress_bar_config(disable=True)
        return pipe


@cache
def built(model: TinyModel) -> nn.Module:
    """A model's network, made once; not to be changed."""
    torch.manual_seed(0)
    return model.network().eval().requires_grad_(False)


def _vae(channels: int, **scale: float) -> nn.Module:
    """An eighth of the picture's size, as the real ones."""
    return stock.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        **scale,
    )


def _sd3_network() -> nn.Module:
    return stock.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
    )


def _sd3_pipeline(network: nn.Module) -> DiffusionPipeline:
    return stock.StableDiffusion3Pipeline(
        transformer=network,
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=flow_scheduler(),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )


def _sd15_network() -> nn.Module:
    return stock.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def _sd15_pipeline(network: nn.Module) -> DiffusionPipeline:
    return stock.StableDiffusionPipeline(
        unet=network,
        vae=_vae(4, scaling_factor=0.18215),
        scheduler=ddim(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_network() -> nn.Module:
    return stock.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 320, 320),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D",) * 3,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=5,
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sdxl_pipeline(network: nn.Module) -> DiffusionPipeline:
    return stock.StableDiffusionXLPipeline(
        unet=network,
        vae=_vae(4, scaling_factor=0.13025),
        scheduler=ddim(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def _pixart_network() -> nn.Module:
    return stock.PixArtTransformer2DModel(
        sample_size=64,
        num_layers=1,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_attention_heads=16,
        attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=4096,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )


def _pixart_pipeline(network: nn.Module) -> DiffusionPipeline:
    return stock.PixArtSigmaPipeline(
        transformer=network,
        vae=_vae(4, scaling_factor=0.13025),
        scheduler=ddim(),
        tokenizer=None,
        text_encoder=None,
    )


def _wan_network() -> nn.Module:
    return stock.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=128,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


@cache
def _wan_vae() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stock.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval()


def _wan_pipeline(network: nn.Module) -> DiffusionPipeline:
    return stock.WanPipeline(
        transformer=network,
        vae=_wan_vae(),
        scheduler=flow_scheduler(),
        tokenizer=None,
        text_encoder=None,
    )


def _size(pixels: int = PIXEL_SIZE, **more: Any) -> dict[str, Any]:
    return {"height": pixels, "width": pixels, "output_type": "latent", **more}


def _images(width: int = PIXEL_SIZE, batch: int = 1) -> dict[str, Any]:
    return {"width": width, "height": width, "batch_size": batch}


PIXART_SCHEDULE = Schedule(kind="vp", beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


def pixart_recipe(family: str, **changes: Any) -> FewStepRecipe:
    """An epsilon recipe on PixArt's betas, which are not Stable Diffusion's."""
    recipe = vp_recipe(family, **changes)
    schedule = PIXART_SCHEDULE.build()
    timesteps = recipe.grids[0].timesteps
    sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), recipe.grids[0].sigmas[-1])
    return replace(
        recipe,
        base=replace(recipe.base, schedule=PIXART_SCHEDULE),
        grids=(replace(recipe.grids[0], sigmas=sigmas),),
    )


SD3 = TinyModel(
    name="sd3",
    family="sd3",
    network=_sd3_network,
    native=dict,  # ComfyUI reads diffusers' names
    wrap=_sd3_pipeline,
    latent_shape=(16, 8, 8),
    empty_latent=("EmptySD3LatentImage", _images()),
    conditioning={"tokens": 6, "width": 128, "pooled": 128},
    call=lambda made: _size(prompt_embeds=made["cond"], pooled_prompt_embeds=made["pooled"]),
    recipe=flow_recipe,
    latent_format="SD3",
)
SD15 = TinyModel(
    name="sd15",
    family="sd15",
    network=_sd15_network,
    native=unet_names,
    wrap=_sd15_pipeline,
    latent_shape=(4, 8, 8),
    empty_latent=("EmptyLatentImage", _images()),
    conditioning={"tokens": 6, "width": 768, "pooled": 0},
    call=lambda made: _size(prompt_embeds=made["cond"]),
    recipe=vp_recipe,
    latent_format="SD15",
    component="unet",
)
SDXL = TinyModel(
    name="sdxl",
    family="sdxl",
    network=_sdxl_network,
    native=unet_names,
    wrap=_sdxl_pipeline,
    latent_shape=(4, 8, 8),
    empty_latent=("EmptyLatentImage", _images()),
    conditioning={"tokens": 6, "width": 2048, "pooled": 1280},
    call=lambda made: _size(prompt_embeds=made["cond"], pooled_prompt_embeds=made["pooled"]),
    recipe=vp_recipe,
    latent_format="SDXL",
    component="unet",
)
WAN = TinyModel(
    name="wan",
    family="wan",
    network=_wan_network,
    native=wan_names,
    wrap=_wan_pipeline,
    latent_shape=(16, 1, 8, 8),
    empty_latent=("EmptyHunyuanLatentVideo", {**_images(), "length": 1}),
    conditioning={"tokens": 6, "width": 4096, "pooled": 0},
    call=lambda made: _size(prompt_embeds=made["cond"], num_frames=1),
    recipe=flow_recipe,
    latent_format="Wan21",
)
PIXART = TinyModel(
    name="pixart",
    family="pixart",
    network=_pixart_network,
    native=pixart_names,
    wrap=_pixart_pipeline,
    latent_shape=(4, 40, 40),
    empty_latent=("EmptyLatentImage", _images(320)),
    conditioning={"tokens": 6, "width": 4096, "pooled": 0},
    call=lambda made: _size(
        320,
        prompt_embeds=made["cond"],
        prompt_attention_mask=torch.ones(made["cond"].shape[:2]),
        negative_prompt=None,
        use_resolution_binning=False,
    ),
    recipe=pixart_recipe,
    latent_format="SDXL",
    pixels=320,
)
ALL_MODELS = (SD3, SD15, SDXL, WAN, PIXART)
