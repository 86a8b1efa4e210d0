"""Every family of backbones with a stock pipeline, random prompts and the call that guides it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from tests.tiny.parts import stock
from tests.tiny_pipelines import (
    build_flux,
    build_pixart,
    build_qwen_image,
    build_sana,
    build_sd3,
    build_sd15,
    build_sdxl,
    build_wan21,
    build_wan22,
    build_z_image,
)

HEIGHT_PX, WIDTH_PX = 32, 64
BATCH = 2
Arguments = Callable[[Condition, Condition, float], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        name: For messages.
        build: Makes the stock pipeline, seeded.
        width: Of the text embeddings.
        arguments: (condition, null condition of as many rows, guidance scale) -> call arguments.
        pooled: Width of the pooled embeddings; 0 for none.
        is_masked: Whether the denoiser looks at a mask.
        is_packed: Whether stock latents are tokens.
        null_tokens: Tokens of the null condition, padding included.
    """

    name: str
    build: Callable[[], Any]
    width: int
    arguments: Arguments
    pooled: int = 0
    is_masked: bool = False
    is_packed: bool = False
    null_tokens: int = 6

    def condition(self) -> Condition:
        """Two prompts; of masked families the second is shorter."""
        return self._condition(seed=1, tokens=6, lengths=(6, 4))

    def null_condition(self) -> Condition:
        """One row, of another length where lengths may differ."""
        return self._condition(seed=2, tokens=self.null_tokens, lengths=(3,))

    def _condition(self, seed: int, tokens: int, lengths: tuple[int, ...]) -> Condition:
        generator = torch.Generator().manual_seed(seed)
        rows = len(lengths)
        sequence = torch.randn(rows, tokens, self.width, generator=generator)
        pooled = torch.randn(rows, self.pooled, generator=generator) if self.pooled else None
        mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        return Condition(sequence, pooled, mask if self.is_masked else None)


def embeds(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    """What most pipelines take."""
    return {
        "prompt_embeds": condition.sequence,
        "negative_prompt_embeds": null.sequence,
        "guidance_scale": scale,
    }


def pooled(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    return {
        **embeds(condition, null, scale),
        "pooled_prompt_embeds": condition.pooled,
        "negative_pooled_prompt_embeds": null.pooled,
    }


def flux(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    return {**pooled(condition, null, scale), "true_cfg_scale": scale, "guidance_scale": 3.5}


def masked(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    return {
        **embeds(condition, null, scale),
        "prompt_attention_mask": _number(condition.mask),
        "negative_prompt_attention_mask": _number(null.mask),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def qwen(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    arguments = embeds(condition, null, scale)
    del arguments["guidance_scale"]
    if scale == 1.0:  # it warns of a negative prompt that has no effect
        del arguments["negative_prompt_embeds"]
    else:
        arguments["negative_prompt_embeds_mask"] = _number(null.mask)
    return {
        **arguments,
        "prompt_embeds_mask": _number(condition.mask),
        "true_cfg_scale": scale,
    }


def z_image(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    return {
        "prompt_embeds": _rows(condition),
        "negative_prompt_embeds": _rows(null),
        "guidance_scale": scale - 1.0,
    }


def video(condition: Condition, null: Condition, scale: float) -> dict[str, Any]:
    return {**embeds(condition, null, scale), "num_frames": 5}


def _number(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask.long()


def _rows(condition: Condition) -> list[Tensor]:
    assert condition.mask is not None
    pairs = zip(condition.sequence, condition.mask, strict=True)
    return [row[real] for row, real in pairs]


def with_config(build: Callable[[], Any], **changes: Any) -> Callable[[], Any]:
    """The same pipeline whose transformer has another configuration."""

    def rebuild() -> Any:
        pipe = build()
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, **changes)
        return pipe

    return rebuild


def random_sample(backbone: Backbone, batch_size: int = BATCH) -> Tensor:
    """Standard normal latents of two pictures, or of two clips of five frames."""
    num_frames = 5 if backbone.layout.frames else 0
    shape = backbone.latent_shape(HEIGHT_PX, WIDTH_PX, num_frames)
    return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(3))


def build_sdxl_v() -> Any:
    """SDXL that predicts v."""
    pipe: Any = build_sdxl()
    config = pipe.scheduler.config
    pipe.scheduler = stock.DDIMScheduler.from_config(config, prediction_type="v_prediction")
    return pipe


def build_pixart_sigma() -> Any:
    """PixArt-sigma, on the betas PixArt was trained with."""
    parts = {**build_pixart().components}
    parts["scheduler"] = stock.DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    return stock.PixArtSigmaPipeline(**parts)


def build_wan_5b() -> Any:
    """Wan 2.2 5B's way: one network that is told a time for every token."""
    return stock.WanPipeline(**build_wan21().components, expand_timesteps=True)


SD15 = Case("sd15", build_sd15, 8, embeds)
SDXL = Case("sdxl", build_sdxl, 64, pooled, pooled=32)
SD3 = Case("sd3", build_sd3, 16, pooled, pooled=16)
FLUX_DEV = Case(
    "flux-dev", with_config(build_flux, guidance_embeds=True), 32, flux, pooled=32, is_packed=True
)
FLUX_SCHNELL = Case("flux-schnell", build_flux, 32, flux, pooled=32, is_packed=True)
PIXART = Case("pixart", build_pixart, 16, masked, is_masked=True)
SANA = Case("sana", build_sana, 8, masked, is_masked=True)
QWEN_IMAGE = Case(
    "qwen-image", build_qwen_image, 16, qwen, is_masked=True, is_packed=True, null_tokens=5
)
Z_IMAGE = Case("z-image", build_z_image, 16, z_image, is_masked=True, null_tokens=3)
WAN21 = Case("wan21", build_wan21, 16, video)
WAN22 = Case("wan22", build_wan22, 16, video)
PIXART_1024 = Case(
    "pixart-1024",
    with_config(build_pixart, sample_size=128, use_additional_conditions=True),
    16,
    masked,
    is_masked=True,
)
SDXL_V = Case("sdxl-v", build_sdxl_v, 64, pooled, pooled=32)
VARIANTS = (
    SDXL_V,
    Case("pixart-sigma", build_pixart_sigma, 16, masked, is_masked=True),
    PIXART_1024,
    Case("sana-variance", with_config(build_sana, out_channels=8), 8, masked, is_masked=True),
    Case("wan22-5b", build_wan_5b, 16, video),
)
FAMILIES = (
    *(SD15, SDXL, SD3, FLUX_DEV, FLUX_SCHNELL, PIXART, SANA, QWEN_IMAGE, Z_IMAGE, WAN21, WAN22),
)
