"""Tiny denoisers of every family that adapters are converted for, and LoRA files for them.

Each has a diffusers model, inputs for one forward, the pipeline class whose loader reads its LoRAs,
and the ComfyUI class and config of the same widths, where ComfyUI 0.8.0 has the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

stock: Any = diffusers


@cache
def _shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build()
    return {name: tuple(values.shape) for name, values in model.named_parameters()}


@dataclass(frozen=True)
class ConversionFamily:
    """One family.

    Attributes:
        name: The family as recipes spell it.
        build: Makes the diffusers denoiser, seeded.
        inputs: Arguments of one forward.
        pipeline: Its pipeline class, for diffusers' own LoRA loader.
        component: Pipeline component the denoiser is.
        comfy_class: Class of comfy.supported_models; None where ComfyUI has no such model.
        comfy_config: Its `unet_config` entries.
        skipped: Endings of weights that a LoRA here leaves alone.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    pipeline: str
    component: str = "transformer"
    comfy_class: str | None = None
    comfy_config: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return dict(_shapes(self.build))

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Module -> weight shape, of everything a LoRA can go on."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.shapes().items()
            if name.endswith(".weight") and len(shape) >= 2 and not name.endswith(self.skipped)
        }

    def lora(
        self, *, scale: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """A LoRA on every module: tensors in diffusers names without component, and alphas.

        Ranks are 2, 3 and 4 in turn; alpha / rank is `scale` throughout.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors, alphas = {}, {}
        for i, (module, shape) in enumerate(self.modules().items()):
            rank = 2 + i % 3
            ones = (1,) * (len(shape) - 2)
            down = torch.randn(rank, *shape[1:], generator=generator)
            up = torch.randn(shape[0], rank, *ones, generator=generator)
            tensors[f"{module}.lora_A.weight"] = (down / down[0].numel() ** 0.5).to(dtype)
            tensors[f"{module}.lora_B.weight"] = (up * 0.3).to(dtype)
            alphas[module] = scale * rank
        return tensors, alphas

    def output(self, model: nn.Module) -> Tensor:
        """One forward."""
        with torch.no_grad():
            result = model(**self.inputs(), return_dict=False)[0]
        return torch.stack(list(result)) if isinstance(result, list) else result


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _unet(is_xl: bool) -> nn.Module:
    torch.manual_seed(0)
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D")
    changes: dict[str, Any] = {"attention_head_dim": 2, "cross_attention_dim": 16}
    if is_xl:
        down, up = down[::-1], up[::-1]
        changes = {
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 16,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 64,
        }
    return stock.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=8,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=32,
        **changes,
    )


def _unet_inputs(is_xl: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": normal(1, 4, 8, 8),
        "timestep": torch.tensor([499]),
        "encoder_hidden_states": normal(1, 5, 16, seed=8),
    }
    if is_xl:
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(1, 16, seed=9),
            "time_ids": torch.full((1, 6), 32.0),
        }
    return inputs


_UNET_COMFY: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [2, 2],
    "context_dim": 16,
    "use_temporal_attention": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "image_size": 32,
}
SD15 = ConversionFamily(
    "sd15",
    lambda: _unet(False),
    lambda: _unet_inputs(False),
    "StableDiffusionPipeline",
    component="unet",
    comfy_class="SD15",
    comfy_config={
        **_UNET_COMFY,
        "num_heads": 8,
        "num_head_channels": -1,
        "transformer_depth": [1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "adm_in_channels": None,
        "use_linear_in_transformer": False,
    },
)
SDXL = ConversionFamily(
    "sdxl",
    lambda: _unet(True),
    lambda: _unet_inputs(True),
    "StableDiffusionXLPipeline",
    component="unet",
    comfy_class="SDXL",
    comfy_config={
        **_UNET_COMFY,
        "num_heads": -1,
        "num_head_channels": 8,
        "transformer_depth": [0, 0, 2, 2],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2],
        "transformer_depth_middle": 2,
        "num_classes": "sequential",
        "adm_in_channels": 64,
        "use_linear_in_transformer": True,
    },
)


def _sd3() -> nn.Module:
    torch.manual_seed(0)
    return stock.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )


SD3 = ConversionFamily(
    "sd3",
    _sd3,
    lambda: {
        "hidden_states": normal(1, 16, 8, 8),
        "encoder_hidden_states": normal(1, 5, 32, seed=8),
        "pooled_projections": normal(1, 24, seed=9),
        "timestep": torch.tensor([500.0]),
    },
    "StableDiffusion3Pipeline",
    comfy_class="SD3",
    comfy_config={
        "depth": 2,
        "in_channels": 16,
        "patch_size": 2,
        "input_size": None,
        "pos_embed_max_size": 8,
        "num_patches": 64,
        "adm_in_channels": 24,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 32, "out_features": 128},
        },
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [0],
    },
)


def _flux() -> nn.Module:
    torch.manual_seed(0)
    return stock.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


FLUX = ConversionFamily(
    "flux",
    _flux,
    lambda: {
        "hidden_states": normal(1, 4, 16),
        "encoder_hidden_states": normal(1, 5, 24, seed=8),
        "pooled_projections": normal(1, 20, seed=9),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(5, 3),
    },
    "FluxPipeline",
    comfy_class="Flux",
    comfy_config={
        "image_model": "flux",
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "vec_in_dim": 20,
        "context_in_dim": 24,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 4, 8],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    },
)


def _pixart() -> nn.Module:
    torch.manual_seed(0)
    return stock.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
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


PIXART = ConversionFamily(
    "pixart",
    _pixart,
    lambda: {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, 5, 16, seed=8),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    "PixArtSigmaPipeline",
    comfy_class="PixArtSigma",
    comfy_config={
        "image_model": "pixart_sigma",
        "patch_size": 2,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 3,
        "input_size": 8,
        "caption_channels": 16,
        "model_max_length": 300,
        "micro_condition": False,
        "pe_interpolation": 1,
    },
)


def _sana() -> nn.Module:
    torch.manual_seed(0)
    return stock.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
    )


SANA = ConversionFamily(
    "sana",
    _sana,
    lambda: {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, 5, 12, seed=8),
        "timestep": torch.tensor([500]),
    },
    "SanaPipeline",
    skipped=("conv_depth.weight",),  # peft wants a rank divisible by the groups
)


def _qwen_image() -> nn.Module:
    torch.manual_seed(0)
    return stock.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(8, 4, 4),
    )


QWEN_IMAGE = ConversionFamily(
    "qwen-image",
    _qwen_image,
    lambda: {
        "hidden_states": normal(1, 4, 16),
        "encoder_hidden_states": normal(1, 5, 24, seed=8),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
    },
    "QwenImagePipeline",
    comfy_class="QwenImage",
    comfy_config={
        "image_model": "qwen_image",
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (8, 4, 4),
    },
)


def _z_image() -> nn.Module:
    torch.manual_seed(0)
    model = stock.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # diffusers leaves the pad tokens uninitialised
        model.x_pad_token.fill_(0.1)
        model.cap_pad_token.fill_(0.1)
    return model


Z_IMAGE = ConversionFamily(
    "z-image",
    _z_image,
    lambda: {
        "x": [normal(16, 1, 8, 8)],
        "t": torch.tensor([0.5]),
        "cap_feats": [normal(5, 16, seed=8)],
    },
    "ZImagePipeline",
    comfy_class="ZImage",
    comfy_config={
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 32,
        "cap_feat_dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "qk_norm": True,
        "n_heads": 2,
        "n_kv_heads": 2,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "multiple_of": 1,
        "z_image_modulation": True,
        "time_scale": 1000.0,
    },
)


def _wan() -> nn.Module:
    torch.manual_seed(0)
    return stock.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


WAN = ConversionFamily(
    "wan",
    _wan,
    lambda: {
        "hidden_states": normal(1, 4, 1, 8, 8),
        "encoder_hidden_states": normal(1, 5, 16, seed=8),
        "timestep": torch.tensor([500]),
    },
    "WanPipeline",
    comfy_class="WAN21_T2V",
    comfy_config={
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 24,
        "num_heads": 2,
        "ffn_dim": 32,
        "num_layers": 2,
        "patch_size": (1, 2, 2),
        "freq_dim": 32,
        "in_dim": 4,
        "out_dim": 4,
        "text_dim": 16,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
    },
)


def _ltx() -> nn.Module:
    torch.manual_seed(0)
    return stock.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )


LTX = ConversionFamily(
    "ltx",
    _ltx,
    lambda: {
        "hidden_states": normal(1, 4, 8),
        "encoder_hidden_states": normal(1, 5, 24, seed=8),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 5),
        "num_frames": 1,
        "height": 2,
        "width": 2,
    },
    "LTXPipeline",
    comfy_class="LTXV",
    comfy_config={
        "image_model": "ltxv",
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": 24,
    },
)


def _hunyuan_video() -> nn.Module:
    torch.manual_seed(0)
    return stock.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 4, 8),
        guidance_embeds=True,
    )


HUNYUAN_VIDEO = ConversionFamily(
    "hunyuan-video",
    _hunyuan_video,
    lambda: {
        "hidden_states": normal(1, 4, 1, 4, 4),
        "encoder_hidden_states": normal(1, 5, 24, seed=8),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": normal(1, 20, seed=9),
        "timestep": torch.tensor([500]),
        "guidance": torch.tensor([6000.0]),
    },
    "HunyuanVideoPipeline",
    comfy_class="HunyuanVideo",
    comfy_config={
        "image_model": "hunyuan_video",
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "vec_in_dim": 20,
        "context_in_dim": 24,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 4, 8],
        "theta": 256,
        "qkv_bias": True,
        "guidance_embed": True,
        "byt5": False,
        "meanflow": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    },
)


def _cogvideox() -> nn.Module:
    torch.manual_seed(0)
    return stock.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=1,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
    )


COGVIDEOX = ConversionFamily(
    "cogvideox",
    _cogvideox,
    lambda: {
        "hidden_states": normal(1, 1, 4, 8, 8),
        "encoder_hidden_states": normal(1, 5, 24, seed=8),
        "timestep": torch.tensor([500]),
    },
    "CogVideoXPipeline",
)

ALL = (
    *(SD15, SDXL, SD3, FLUX, PIXART, SANA, QWEN_IMAGE, Z_IMAGE),
    *(WAN, LTX, HUNYUAN_VIDEO, COGVIDEOX),
)
IN_COMFYUI = tuple(family for family in ALL if family.comfy_class)
