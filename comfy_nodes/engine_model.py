"""An export as ComfyUI's MODEL: samplers, masks, guiders and previews are the stock ones.

ComfyUI builds a model of the family without its network; the engine takes the network's place.
"""

from typing import Any

import comfy.conds  # pyright: ignore[reportMissingImports]
import comfy.latent_formats  # pyright: ignore[reportMissingImports]
import comfy.model_base  # pyright: ignore[reportMissingImports]
import comfy.model_management  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from fewstep.comfy_nodes.engine_network import EngineNetwork, EnginePatcher
from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.recipe import FewStepRecipe

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""Our name of a table of betas -> ComfyUI's."""

STOCK_FACTOR = 8
"""Pixels per latent that ComfyUI reckons with where CONDITIONING does not name a size."""


class OnEngine:
    """Beside ComfyUI's class of a family: little memory, and what the graph is told."""

    engine: Engine

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """What has to be free before sampling: the weights, until they are loaded."""
        return float(self.engine.missing_bytes)

    def size_in(self, conditioning: dict[str, Any]) -> tuple[int, int]:
        """(height, width) the conditioning names; else that of the picture."""
        sides = []
        for name, axis in (("height", 2), ("width", 3)):
            latents = conditioning["noise"].shape[axis]
            named = conditioning.get(name)
            if named is None or named == latents * STOCK_FACTOR:
                named = latents * self.engine.host.factor
            sides.append(int(named))
        return sides[0], sides[1]


class EngineSd15(OnEngine, comfy.model_base.BaseModel):
    """SD 1.x and 2.x; latent consistency models among them are told a guidance scale."""

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """With the guidance scale, where CONDITIONING names one."""
        return {**super().extra_conds(**conditioning), **_told_guidance(conditioning)}


class EngineSdxl(OnEngine, comfy.model_base.SDXL):
    """SDXL: its graph takes the pooled output and the six numbers of the sizes by themselves."""

    def encode_adm(self, **conditioning: Any) -> Tensor:
        """The pooled output."""
        return conditioning["pooled_output"]

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """With the sizes."""
        height, width = self.size_in(conditioning)
        sizes = (
            height,
            width,
            conditioning.get("crop_h", 0),
            conditioning.get("crop_w", 0),
            conditioning.get("target_height", height),
            conditioning.get("target_width", width),
        )
        told = {"time_ids": _regular([sizes]), **_told_guidance(conditioning)}
        return {**super().extra_conds(**conditioning), **told}


class EngineSd3(OnEngine, comfy.model_base.SD3):
    """SD3."""


class EngineFlux(OnEngine, comfy.model_base.Flux):
    """FLUX.1: told the recipe's guidance, unless CONDITIONING names another."""

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """Without ComfyUI's own default of 3.5."""
        found = super().extra_conds(**conditioning)
        found.pop("guidance", None)
        return {**found, **_told_guidance(conditioning)}


class EnginePixArt(OnEngine, comfy.model_base.PixArt):
    """PixArt, with the mask of the prompt's tokens and the picture's size."""

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """With the mask."""
        found = super().extra_conds(**conditioning)
        height, width = self.size_in(conditioning)
        found["resolution"] = _regular([(height, width)])
        found["aspect_ratio"] = _regular([(conditioning.get("aspect_ratio", height / width),)])
        mask = conditioning.get("attention_mask")
        if mask is not None:
            found["attention_mask"] = comfy.conds.CONDRegular(mask)
        return found


def make_model(engine: Engine) -> EnginePatcher:
    """A MODEL on an engine."""
    model = _build(engine)
    model.engine = engine
    model.diffusion_model = EngineNetwork(engine)
    patcher = EnginePatcher(
        model.train(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, _release)
    return patcher


def _release(patcher: EnginePatcher, unpatch_all: bool = True) -> None:
    """ComfyUI wants the memory back; when it only changes to another clone it says so."""
    if unpatch_all:
        patcher.model.engine.release()


def _build(engine: Engine) -> Any:
    """ComfyUI's model of the family, without a network."""
    manifest, prediction = engine.folder.manifest, engine.folder.recipe.base.prediction
    kinds, models = comfy.model_base.ModelType, comfy.supported_models
    made, stock = {
        "sd15": (EngineSd15, models.SD15),
        "sdxl": (EngineSdxl, models.SDXL),
        "sd3": (EngineSd3, models.SD3),
        "flux": (EngineFlux, models.FluxSchnell),
        "pixart": (EnginePixArt, models.PixArtSigma),
    }[manifest.family]
    kind = {"epsilon": kinds.EPS, "v": kinds.V_PREDICTION, "flow": kinds.FLOW}[prediction]
    inputs = manifest.graphs[engine.host.denoiser].inputs
    if made is EngineFlux and any(tensor.name == "guidance" for tensor in inputs):
        stock, kind = models.Flux, kinds.FLUX
    model: Any = made
    return model(_config(engine, stock), kind)


def _config(engine: Engine, family: Any) -> Any:
    """ComfyUI's configuration of a family, with the export's latents and schedule."""
    channels = engine.host.channels
    network = {
        "disable_unet_model_creation": True,
        "in_channels": channels,
        "out_channels": channels,
        "dtype": EngineNetwork.dtype,
    }
    config = family({**family.unet_config, **network})
    config.latent_format = EngineLatents(config.latent_format, engine)
    config.sampling_settings |= _betas(engine.folder.recipe)
    return config


def _betas(recipe: FewStepRecipe) -> dict[str, Any]:
    schedule = recipe.base.schedule
    if schedule.kind != "vp":
        return {}
    assert schedule.beta_schedule is not None
    return {
        "beta_schedule": BETAS[schedule.beta_schedule],
        "linear_start": schedule.beta_start,
        "linear_end": schedule.beta_end,
        "timesteps": schedule.num_train_timesteps,
    }


class EngineLatents(comfy.latent_formats.LatentFormat):
    """Channels and scale of an export's latents; previews as the family has them.

    Args:
        family: ComfyUI's format of the family.
        engine: Whose manifest has the numbers.
    """

    def __init__(self, family: Any, engine: Engine) -> None:
        settings = engine.folder.manifest.settings
        if engine.host.channels == family.latent_channels:
            self.__dict__.update(family.__dict__)
        self.latent_channels = engine.host.channels
        self.scale_factor = settings["scaling_factor"]
        self.shift_factor = settings["shift_factor"]

    def process_in(self, latent: Tensor) -> Tensor:
        """From the autoencoder's scale to the network's."""
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent: Tensor) -> Tensor:
        """From the network's scale to the autoencoder's."""
        return latent / self.scale_factor + self.shift_factor


def _told_guidance(conditioning: dict[str, Any]) -> dict[str, Any]:
    scale = conditioning.get("guidance")
    if scale is None:
        return {}
    return {"guidance": comfy.conds.CONDRegular(torch.tensor([float(scale)]))}


def _regular(rows: list[tuple[float, ...]]) -> Any:
    return comfy.conds.CONDRegular(torch.tensor(rows, dtype=torch.float32))
