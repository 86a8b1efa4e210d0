"""Tiny random pipelines of every family, from diffusers' own classes; no hub, no text encoders.

Each comes with the arguments that call it (prompt embeddings of a batch) and the components that
are its denoiser, so that one test can be run over all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.recipe import Base, FewStepRecipe, Grid, Sampler, Schedule

stock: Any = diffusers
"""Untyped: diffusers annotates tuples of any length as `tuple[int]`, and None nowhere."""
VP_GRID = (999.0, 749.0, 499.0, 249.0)
FLOW_GRID = (1000.0, 937.5, 2500.0 / 3.0, 625.0)
SD_SCHEDULE = Schedule(kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW_SCHEDULE = Schedule(kind="flow", shift=5.0)


def vp_recipe(
    family: str,
    *,
    timesteps: tuple[float, ...] = VP_GRID,
    stochasticity: float = 0.0,
    steps: Any = "strict",
    **changes: Any,
) -> FewStepRecipe:
    """An epsilon recipe on Stable Diffusion's betas."""
    schedule = SD_SCHEDULE.build()
    sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
    recipe = FewStepRecipe(
        base=Base(family=family, prediction="epsilon", schedule=SD_SCHEDULE),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=len(timesteps),
        steps=steps,
        sampler=Sampler(stochasticity=stochasticity),
    )
    return replace(recipe, **changes)


def flow_recipe(
    family: str,
    timesteps: tuple[float, ...] = FLOW_GRID,
    *,
    stochasticity: float = 0.0,
    prediction: Any = "flow",
    schedule: Schedule = FLOW_SCHEDULE,
    **changes: Any,
) -> FewStepRecipe:
    """A recipe on a flow schedule (or another one that is passed), shifted by 5."""
    levels = schedule.build()
    sigmas = (*(levels.sigma_of_timestep(t) for t in timesteps), 0.0)
    recipe = FewStepRecipe(
        base=Base(family=family, prediction=prediction, schedule=schedule),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=len(timesteps),
        sampler=Sampler(stochasticity=stochasticity),
    )
    return replace(recipe, **changes)


@dataclass(frozen=True)
class TinyFamily:
    """One family.

    Attributes:
        name: The family as recipes spell it, or a variant of it.
        family: The family as recipes spell it.
        build: Makes the stock pipeline, seeded.
        arguments: Batch size -> call arguments without steps, guidance and seed.
        latent_shape: One image's latents before any packing.
        denoisers: Names of the denoiser components.
        clock: The timestep of the grid, from what the denoiser was told.
        is_vp: Whether it is of the VP kind; else flow.
    """

    name: str
    family: str
    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[int], dict[str, Any]]
    latent_shape: tuple[int, ...]
    denoisers: tuple[str, ...] = ("transformer",)
    clock: Callable[[float], float] = lambda told: told
    is_vp: bool = False

    def recipe(self, **changes: Any) -> FewStepRecipe:
        """A four-step recipe for it."""
        make = vp_recipe if self.is_vp else flow_recipe
        return make(self.family, **changes)


def embeds(batch: int, *shape: int) -> Tensor:
    """Prompt embeddings: image i of any batch has the same ones."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(90 + i)) for i in range(99)]
    return torch.stack(rows[:batch])


def record_denoiser(pipe: DiffusionPipeline, family: TinyFamily) -> list[tuple[str, Tensor, Any]]:
    """From now on, (component, timesteps, sample) of every denoiser call, in order."""
    calls: list[tuple[str, Tensor, Any]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            calls.append((name, torch.as_tensor(timestep).reshape(-1), sample))

        return hook

    for name in family.denoisers:
        pipe.components[name].register_forward_pre_hook(hook_of(name), with_kwargs=True)
    return calls


def seen_timesteps(calls: Sequence[tuple[str, Tensor, Any]], family: TinyFamily) -> list[float]:
    """The grid's timesteps as the denoiser was told them."""
    return [family.clock(float(timestep[0])) for _, timestep, _ in calls]


def _kl(channels: int, **changes: Any) -> Any:
    return stock.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **changes,
    )


def _flow_scheduler() -> Any:
    return stock.FlowMatchEulerDiscreteScheduler(shift=3.0)


def _ddim() -> Any:
    return stock.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


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
        vae=_kl(4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=_ddim(),
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
        vae=_kl(4),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def build_sd3() -> DiffusionPipeline:
    """StableDiffusion3Pipeline without text encoders."""
    torch.manual_seed(0)
    transformer = stock.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    missing: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3")
        + ("tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return stock.StableDiffusion3Pipeline(
        vae=_kl(4, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=transformer,
        scheduler=_flow_scheduler(),
        **missing,
    )


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
        vae=_kl(1, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=transformer,
        scheduler=_flow_scheduler(),
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
        vae=_kl(4),
        transformer=transformer,
        scheduler=_ddim(),
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
    vae = stock.AutoencoderDC(
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
    return stock.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=_flow_scheduler(),
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
        scheduler=_flow_scheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


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
        scheduler=_flow_scheduler(),
        transformer=_wan_transformer(),
    )


def build_wan22() -> DiffusionPipeline:
    """WanPipeline with a high-noise and a low-noise transformer."""
    torch.manual_seed(0)
    return stock.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_wan_vae(),
        scheduler=_flow_scheduler(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.875,
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
        scheduler=_flow_scheduler(),
        vae=_kl(16, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _size(**rest: Any) -> dict[str, Any]:
    return {"height": 32, "width": 32, "output_type": "latent", **rest}


def _video(batch: int) -> dict[str, Any]:
    return _size(num_frames=5, prompt_embeds=embeds(batch, 6, 16))


def _masked(batch: int, width: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeds(batch, 6, width),
        "prompt_attention_mask": torch.ones(batch, 6),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


SD15 = TinyFamily(
    "sd15",
    "sd15",
    build_sd15,
    lambda batch: _size(prompt_embeds=embeds(batch, 6, 8)),
    (4, 16, 16),
    denoisers=("unet",),
    is_vp=True,
)
SDXL = TinyFamily(
    "sdxl",
    "sdxl",
    build_sdxl,
    lambda batch: _size(prompt_embeds=embeds(batch, 6, 64), pooled_prompt_embeds=embeds(batch, 32)),
    (4, 16, 16),
    denoisers=("unet",),
    is_vp=True,
)
SD3 = TinyFamily(
    "sd3",
    "sd3",
    build_sd3,
    lambda batch: _size(prompt_embeds=embeds(batch, 6, 16), pooled_prompt_embeds=embeds(batch, 16)),
    (4, 16, 16),
)
FLUX = TinyFamily(
    "flux",
    "flux",
    build_flux,
    lambda batch: _size(prompt_embeds=embeds(batch, 6, 32), pooled_prompt_embeds=embeds(batch, 32)),
    (1, 16, 16),
    clock=lambda told: 1000.0 * told,
)
PIXART = TinyFamily(
    "pixart", "pixart", build_pixart, lambda b: _size(**_masked(b, 16)), (4, 16, 16), is_vp=True
)
SANA = TinyFamily("sana", "sana", build_sana, lambda b: _size(**_masked(b, 8)), (4, 16, 16))
QWEN_IMAGE = TinyFamily(
    "qwen-image",
    "qwen-image",
    build_qwen_image,
    lambda batch: _size(
        prompt_embeds=embeds(batch, 6, 16), prompt_embeds_mask=torch.ones(batch, 6).long()
    ),
    (1, 4, 8, 8),
    clock=lambda told: 1000.0 * told,
)
WAN21 = TinyFamily("wan21", "wan", build_wan21, _video, (4, 2, 4, 4))
WAN22 = TinyFamily(
    "wan22", "wan", build_wan22, _video, (4, 2, 4, 4), denoisers=("transformer", "transformer_2")
)
Z_IMAGE = TinyFamily(
    "z-image",
    "z-image",
    build_z_image,
    lambda batch: _size(prompt_embeds=list(embeds(batch, 6, 16))),
    (16, 16, 16),
    clock=lambda told: 1000.0 * (1.0 - told),
)
ALL_FAMILIES = (SD15, SDXL, SD3, FLUX, PIXART, SANA, QWEN_IMAGE, WAN21, WAN22, Z_IMAGE)
