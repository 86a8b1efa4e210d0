"""From a folder or hub id to the backbone of its family."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.errors import ConfigError
from fewstep.loading import load_stock_pipeline
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.flux import FluxBackbone
from fewstep.trainer.backbones.pixart import PixArtBackbone
from fewstep.trainer.backbones.qwen_image import QwenImageBackbone
from fewstep.trainer.backbones.sana import SanaBackbone
from fewstep.trainer.backbones.sd3 import Sd3Backbone
from fewstep.trainer.backbones.sdxl import SdxlBackbone
from fewstep.trainer.backbones.settings import EdgeSettings
from fewstep.trainer.backbones.stable_diffusion import SdBackbone
from fewstep.trainer.backbones.wan import WanBackbone
from fewstep.trainer.backbones.z_image import ZImageBackbone

# pipeline class name -> its backbone; names, so that no pipeline class is imported needlessly
BACKBONES: dict[str, Callable[[DiffusionPipeline, EdgeSettings], Backbone]] = {
    "StableDiffusionPipeline": SdBackbone,
    "StableDiffusionXLPipeline": SdxlBackbone,
    "StableDiffusion3Pipeline": Sd3Backbone,
    "FluxPipeline": FluxBackbone,
    "PixArtAlphaPipeline": PixArtBackbone,
    "PixArtSigmaPipeline": PixArtBackbone,
    "SanaPipeline": SanaBackbone,
    "QwenImagePipeline": QwenImageBackbone,
    "ZImagePipeline": ZImageBackbone,
    "WanPipeline": WanBackbone,
}


def load_backbone(
    model: str,
    *,
    precision: torch.dtype,
    device: torch.device,
    max_sequence_length: int = 0,
    embedded_guidance: float | None = None,
) -> Backbone:
    """Load a pipeline from a folder or the hub and wrap it for training.

    Args:
        model: Folder or hub id.
        precision: Of every part.
        device: Where to.
        max_sequence_length: See `EdgeSettings`.
        embedded_guidance: See `EdgeSettings`.

    Raises:
        ConfigError: The folder is no diffusers pipeline, or of a kind not supported yet.
    """
    try:
        pipe = load_stock_pipeline(model, dtype=precision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model} could not be loaded as a diffusers pipeline ({error}); give a folder with a "
            "model_index.json, a hub id, digits-sd3 or digits-sd15"
        ) from error
    pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return wrap_pipeline(
        pipe, max_sequence_length=max_sequence_length, embedded_guidance=embedded_guidance
    )


def wrap_pipeline(
    pipe: DiffusionPipeline,
    *,
    max_sequence_length: int = 0,
    embedded_guidance: float | None = None,
) -> Backbone:
    """The backbone of a loaded pipeline.

    Raises:
        ConfigError: No backbone for this pipeline class, or a setting means nothing to it.
    """
    make = BACKBONES.get(type(pipe).__name__)
    if make is None:
        raise ConfigError(
            f"{type(pipe).__name__} cannot be distilled yet; this release trains "
            f"{', '.join(sorted(BACKBONES))}"
        )
    settings = EdgeSettings(
        max_sequence_length=max_sequence_length, embedded_guidance=embedded_guidance
    )
    return make(pipe, settings)
