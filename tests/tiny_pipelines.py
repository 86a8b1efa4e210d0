"""Tiny random pipelines of every family, from diffusers' own classes; no hub, no text encoders.

Each comes with the arguments that call it (prompt embeddings of a batch) and the components that
are its denoiser, so that one test can be run over all of them. The parts are in `tests.tiny`.
"""

from tests.tiny.families import (
    ALL_FAMILIES,
    FLUX,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    SD15,
    SDXL,
    WAN21,
    WAN22,
    Z_IMAGE,
)
from tests.tiny.family import TinyFamily, embeds, record_denoiser, seen_timesteps
from tests.tiny.parts import stock
from tests.tiny.recipes import (
    FLOW_GRID,
    FLOW_SCHEDULE,
    SD_SCHEDULE,
    VP_GRID,
    flow_recipe,
    vp_recipe,
)
from tests.tiny.stable_diffusion import build_sd3, build_sd15, build_sdxl
from tests.tiny.transformers import (
    build_flux,
    build_pixart,
    build_qwen_image,
    build_sana,
    build_z_image,
)
from tests.tiny.video import build_wan21, build_wan22

__all__ = [
    "ALL_FAMILIES",
    "FLOW_GRID",
    "FLOW_SCHEDULE",
    "FLUX",
    "PIXART",
    "QWEN_IMAGE",
    "SANA",
    "SD3",
    "SD15",
    "SDXL",
    "SD_SCHEDULE",
    "VP_GRID",
    "WAN21",
    "WAN22",
    "Z_IMAGE",
    "TinyFamily",
    "build_flux",
    "build_pixart",
    "build_qwen_image",
    "build_sana",
    "build_sd3",
    "build_sd15",
    "build_sdxl",
    "build_wan21",
    "build_wan22",
    "build_z_image",
    "embeds",
    "flow_recipe",
    "record_denoiser",
    "seen_timesteps",
    "stock",
    "vp_recipe",
]
