"""The ten families, with the arguments that call them."""

from typing import Any

import torch

from tests.tiny.family import TinyFamily, embeds
from tests.tiny.stable_diffusion import build_sd3, build_sd15, build_sdxl
from tests.tiny.transformers import (
    build_flux,
    build_pixart,
    build_qwen_image,
    build_sana,
    build_z_image,
)
from tests.tiny.video import build_wan21, build_wan22


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
