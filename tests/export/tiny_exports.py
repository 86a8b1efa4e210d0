"""Tiny random pipelines with text encoders, exported once per session and drawn by both hosts."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.export.families.registry import family_of
from fewstep.export.merging import MergedPipeline, set_precision
from fewstep.export.onnx_folder import write_folder
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.hosts.packing import unpack
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Precision
from fewstep.runtime.providers import make_loader
from tests.expert_files import expert_recipe
from tests.made_once import made_once
from tests.tiny.parts import stock
from tests.tiny.video import build_wan21, build_wan22
from tests.tiny_pipelines import WAN22, flow_recipe, vp_recipe
from tests.trainer import backbone_cases as cases
from tests.trainer import tiny_text

PROMPTS = ("a red cat", "two big blue dogs run", "")


@dataclass(frozen=True)
class TinyExport:
    """A pipeline that is exported.

    Attributes:
        name: For messages.
        family: As recipes spell it.
        build: Makes the pipeline, seeded, without text encoders.
        encoders: Makes what reads text.
        arguments: Of a stock call, beside prompt, size and seed.
        step: Pixels that sides are multiples of.
        is_vp: Whether it is of the VP kind; else flow.
        text_length: What its recipes say; None takes the stock pipeline's.
        has_experts: Whether two networks take turns, an expert each.
    """

    name: str
    family: str
    build: Callable[[], Any]
    encoders: Callable[[], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    step: int = 4
    is_vp: bool = False
    text_length: int | None = None
    has_experts: bool = False

    def pipeline(self) -> Any:
        """The stock pipeline."""
        pipe = self.build()
        pipe.register_modules(**self.encoders())
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipe, name, None) is not None:
                spread(getattr(pipe, name))
        pipe.set_progress_bar_config(disable=True)
        return type(pipe)(**_components(pipe))

    def recipe(self, **changes: Any) -> FewStepRecipe:
        """Four steps."""
        if self.has_experts:
            recipe = expert_recipe(WAN22, own_networks=True, **changes)
        else:
            recipe = (vp_recipe if self.is_vp else flow_recipe)(self.family, **changes)
        base = replace(recipe.base, max_sequence_length=self.text_length)
        return replace(recipe, base=base)

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) of so many of the smallest squares."""
        return rows * self.step, columns * self.step


def _components(pipe: Any) -> dict[str, Any]:
    """With its flags, so that what a pipeline reads off its tokenizers is read again."""
    flags = {name: value for name, value in pipe.config.items() if isinstance(value, bool)}
    return {**flags, **pipe.components}


def spread(encoder: torch.nn.Module) -> None:
    """Larger embeddings: freshly made ones differ too little for a picture to show."""
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "embed" in name and weight.ndim == 2:
                weight.mul_(10.0)


def build_lcm() -> Any:
    """A latent consistency model: its UNet is told the guidance scale."""
    pipe = cases.build_sd15()
    torch.manual_seed(0)
    config = pipe.unet.config
    pipe.unet = stock.UNet2DConditionModel.from_config(config, time_cond_proj_dim=8)
    parts = {**pipe.components, "scheduler": stock.LCMScheduler()}
    return stock.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def with_decoder(build: Callable[[], Any]) -> Callable[[], Any]:
    """A Wan whose latents have a mean and a deviation.

    Its decoder is wider than the tiny one: three channels of a pixel are sometimes all but zero,
    and a norm over them makes differences of rounding as large as the picture.
    """

    def built() -> Any:
        pipe = build()
        torch.manual_seed(0)
        changes = {"base_dim": 8, "latents_mean": [0.1, -0.2, 0.0, 0.3]}
        deviation = {"latents_std": [1.5, 0.8, 1.0, 1.2]}
        vae = stock.AutoencoderKLWan.from_config(pipe.vae.config, **changes, **deviation)
        pipe.register_modules(vae=vae.eval())
        return pipe

    return built


UNBINNED = {"use_resolution_binning": False}
FRAMES = 9
"""Of clips: three latent frames, the first, the second and one like all after it."""


def clips(name: str, build: Callable[[], Any], *, has_experts: bool = False) -> TinyExport:
    """A Wan."""
    return TinyExport(
        name,
        "wan",
        with_decoder(build),
        tiny_text.one(functools.partial(tiny_text.t5, multilingual=True), 16),
        {"num_frames": FRAMES},
        step=16,
        text_length=16,
        has_experts=has_experts,
    )


EXPORTS = (
    TinyExport("flux-dev", "flux", cases.FLUX_DEV.build, tiny_text.flux_encoders, text_length=16),
    TinyExport(
        "flux-schnell", "flux", cases.FLUX_SCHNELL.build, tiny_text.flux_encoders, text_length=16
    ),
    TinyExport(
        "pixart-sigma",
        "pixart",
        cases.build_pixart_sigma,
        tiny_text.one(tiny_text.t5, 16),
        UNBINNED,
        step=8,
        is_vp=True,
    ),
    TinyExport(
        "pixart-alpha-1024",
        "pixart",
        cases.PIXART_1024.build,
        tiny_text.one(tiny_text.t5, 16),
        UNBINNED,
        step=8,
        is_vp=True,
    ),
    TinyExport(
        "sana", "sana", cases.build_sana, tiny_text.one(tiny_text.gemma, 8), UNBINNED, step=32
    ),
    TinyExport(
        "qwen-image",
        "qwen-image",
        cases.build_qwen_image,
        tiny_text.one(tiny_text.qwen_vl, 16),
        step=8,
    ),
    TinyExport("z-image", "z-image", cases.build_z_image, tiny_text.one(tiny_text.qwen3, 16)),
    TinyExport(
        "sd15", "sd15", cases.build_sd15, tiny_text.one(tiny_text.clip, 8), step=8, is_vp=True
    ),
    TinyExport("lcm", "sd15", build_lcm, tiny_text.one(tiny_text.clip, 8), step=8, is_vp=True),
    TinyExport("sdxl", "sdxl", cases.build_sdxl, tiny_text.clip_pair, step=8, is_vp=True),
    TinyExport("sd3", "sd3", cases.build_sd3, tiny_text.sd3_encoders, step=2),
    clips("wan21", build_wan21),
    clips("wan22", build_wan22, has_experts=True),
)
BY_NAME = {export.name: export for export in EXPORTS}
QUICK = ("qwen-image",)
"""The family with most of its own; an export takes seconds, so the others are nightly."""


def named(*names: str) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in names
    ]


EVERY = pytest.mark.parametrize("name", named(*(export.name for export in EXPORTS)))


def exported(name: str, precision: Precision = "fp32", opset: int = 18) -> Path:
    """The export folder of a pipeline, made once."""
    return made_once(
        f"{name}-{precision}-{opset}", lambda folder: _export(folder, name, precision, opset)
    )


def _export(folder: Path, name: str, precision: Precision, opset: int) -> None:
    export = BY_NAME[name]
    pipe = export.pipeline()
    family = family_of(type(pipe).__name__)
    merged = MergedPipeline(pipe, export.recipe(), family, 0.0, precision)
    set_precision(merged, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        write_folder(merged, folder, opset=opset, progress=lambda _: None)


def runtime_of(name: str, recipe: FewStepRecipe, *form: Any) -> FewStepRuntime:
    """The runtime on an exported folder (of a precision and opset), sampled by another recipe."""
    opened = replace(ExportFolder.open(exported(name, *form)), recipe=recipe)
    loader = make_loader(opened, "cpu", threads=1, has_cache=False)
    return FewStepRuntime(opened, loader, host_of(opened.manifest.family))


@dataclass(frozen=True)
class Drawn:
    """Finished latents (B, C, h, w), and pictures (B, H, W, 3), uint8; clips have one axis more."""

    latents: np.ndarray
    pixels: np.ndarray


def by_runtime(
    runtime: FewStepRuntime, prompts: list[str], size: tuple[int, int], **more: Any
) -> Drawn:
    """What the runtime draws, seed 7 and up."""
    seen: list[np.ndarray] = []
    if runtime.folder.manifest.makes_clips:
        more = {"frames": FRAMES, **more}
    found = runtime(prompts, seed=7, size=size, callback=lambda e: seen.append(e.x0), **more)
    return Drawn(seen[-1], found.pixels)


def by_pipeline(
    export: TinyExport,
    recipe: FewStepRecipe,
    prompts: list[str],
    size: tuple[int, int],
    **more: Any,
) -> Drawn:
    """What FewStepPipeline draws, seed 7 and up."""
    pipe: Any = FewStepPipeline.wrap(export.pipeline(), recipe=recipe)
    pipe.set_progress_bar_config(disable=True)
    height, width = size
    found = []
    for kind in ("latent", "np"):
        found.append(
            pipe(
                prompt=list(prompts),
                height=height,
                width=width,
                seed=7,
                output_type=kind,
                **export.arguments,
                # stock Z-Image writes into the lists it is given
                **{k: list(v) if isinstance(v, list) else v for k, v in more.items()},
            )[0]
        )
    latents = found[0].float().numpy()
    if latents.ndim == 3:
        factor = pipe.vae_scale_factor
        latents = unpack(latents, height // factor, width // factor)
    return Drawn(latents, np.round(found[1] * 255.0).astype(np.uint8))


def assert_same(ours: Drawn, theirs: Drawn) -> None:
    """One grey level at most, and latents that differ by rounding alone."""
    scale = np.abs(theirs.latents).max()
    assert np.abs(ours.latents - theirs.latents).max() < 2e-4 * max(scale, 1.0)
    difference = np.abs(ours.pixels.astype(int) - theirs.pixels.astype(int))
    assert ours.pixels.shape == theirs.pixels.shape
    assert difference.max() <= 1
