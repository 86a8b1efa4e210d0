"""Layers, sizes and recipe facts of every family, and what is refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, Vp
from fewstep.recipe import Guidance, Schedule
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.latents import LatentLayout, pack, unpack
from fewstep.trainer.backbones.loading import BACKBONES, load_backbone, wrap_pipeline
from fewstep.trainer.roles import Role
from fewstep.zoo import entries
from tests.tiny.parts import stock
from tests.tiny_pipelines import build_flux, build_sana, build_sd3, build_sd15, build_wan21
from tests.trainer.backbone_cases import (
    BATCH,
    FAMILIES,
    FLUX_DEV,
    FLUX_SCHNELL,
    HEIGHT_PX,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    SD15,
    SDXL,
    WAN21,
    WIDTH_PX,
    Z_IMAGE,
    Case,
    random_sample,
)

EVERY = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@EVERY
def test_every_lora_target_is_a_layer_that_the_prediction_depends_on(case: Case) -> None:
    backbone = wrap_pipeline(case.build())
    backbone.denoiser.requires_grad_(False)
    chosen: dict[str, list[nn.Module]] = {pattern: [] for pattern in backbone.lora_targets}
    for path, module in backbone.denoiser.named_modules():
        hits = [pattern for pattern in backbone.lora_targets if re.search(pattern, path)]
        if hits and isinstance(module, nn.Linear | nn.Conv2d):
            assert len(hits) == 1
            assert not isinstance(module, nn.Conv2d) or module.groups == 1
            chosen[hits[0]].append(module.requires_grad_())
    sample = random_sample(backbone)
    for timestep in (999.0, 10.0):  # of Wan 2.2, one network and then the other
        levels = backbone.level_batch(backbone.schedule.level(timestep), BATCH)
        backbone.x0(Role.TEACHER, sample, levels, case.condition()).square().sum().backward()
    for pattern, layers in chosen.items():
        assert layers, pattern
        moved = [layer for layer in layers if _has_gradient(layer)]
        # the last block's text half is thrown away by SD3 and Qwen-Image; all other layers count
        assert len(moved) >= (1 if case in (SD3, QWEN_IMAGE) else len(layers)), pattern


def _has_gradient(layer: nn.Module) -> bool:
    gradient = next(layer.parameters()).grad
    return gradient is not None and bool((gradient != 0.0).any())


@EVERY
def test_every_feature_layer_speaks_of_every_sample(case: Case) -> None:
    backbone = wrap_pipeline(case.build())
    heard: dict[str, Any] = {}
    for path in backbone.feature_layers:
        backbone.denoiser.get_submodule(path).register_forward_hook(
            lambda _, args, output, path=path: heard.__setitem__(path, output)
        )
    sample = random_sample(backbone)
    with torch.no_grad():
        for timestep in (999.0, 10.0):
            levels = backbone.level_batch(backbone.schedule.level(timestep), BATCH)
            backbone.x0(Role.TEACHER, sample, levels, case.condition())
    assert list(heard) == list(backbone.feature_layers)
    assert heard
    for output in heard.values():
        parts = output if isinstance(output, tuple) else (output,)
        picture = [part for part in parts if isinstance(part, Tensor)][-1]
        assert len(picture) == BATCH  # the picture's half is the last tensor of a tuple


@EVERY
def test_the_recipe_says_what_the_scheduler_says(case: Case) -> None:
    pipe = case.build()
    backbone = wrap_pipeline(pipe)
    base = backbone.base("owner/name")
    assert base.model_id == "owner/name"
    assert base.schedule.build() == backbone.schedule
    assert base.prediction == backbone.prediction
    if isinstance(backbone.schedule, Flow):
        assert (base.prediction, base.schedule.shift) == ("flow", 3.0)
    else:
        config = pipe.scheduler.config
        assert isinstance(backbone.schedule, Vp)
        assert base.schedule.beta_end == config.beta_end
        torch.testing.assert_close(
            torch.from_numpy(backbone.schedule.sigmas()).square(),
            (1.0 - pipe.scheduler.alphas_cumprod).double(),
            rtol=1e-5,
            atol=1e-7,
        )


@EVERY
def test_families_are_named_as_in_the_zoo_with_the_same_kind_of_model(case: Case) -> None:
    base = wrap_pipeline(case.build()).base("x")
    known = [entry.recipe.base for entry in entries() if entry.recipe is not None]
    known = [other for other in known if other.family == base.family]
    if base.family == "sana":  # the zoo knows SANA-Sprint only, which is another family
        assert not known
        return
    kinds = {(other.prediction, other.schedule.kind) for other in known}
    assert (base.prediction, base.schedule.kind) in kinds


def test_v_prediction_and_flow_are_read_from_the_scheduler() -> None:
    pipe: Any = SDXL.build()
    config = pipe.scheduler.config
    pipe.scheduler = stock.DDIMScheduler.from_config(config, prediction_type="v_prediction")
    assert wrap_pipeline(pipe).base("x").prediction == "v"
    for build, scheduler in (
        (build_sana, stock.DPMSolverMultistepScheduler),
        (build_wan21, stock.UniPCMultistepScheduler),
    ):
        pipe = build()
        pipe.scheduler = scheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        base = wrap_pipeline(pipe).base("x")
        assert (base.prediction, base.schedule) == ("flow", Schedule(kind="flow", shift=5.0))


def test_a_shift_that_follows_the_size_is_the_one_of_the_models_own_size() -> None:
    """FLUX.1-dev: mu 1.15 at 4096 tokens; stock shifts by its exponential."""
    pipe: Any = build_flux()
    pipe.scheduler = stock.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    backbone = wrap_pipeline(pipe)
    assert backbone.layout.num_tokens == 4096
    shift = backbone.base("x").schedule.shift
    assert shift == pytest.approx(math.exp(1.15))
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    expected = [t / 1000.0 for t in Flow(shift or 0.0).uniform_timesteps(4)]
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx(expected, rel=1e-6)


def test_flux_dev_embeds_the_guidance_it_is_told_and_schnell_none() -> None:
    pipe = FLUX_DEV.build()
    assert wrap_pipeline(pipe).guidance == Guidance(mode="embedded", scale=3.5)
    backbone = wrap_pipeline(pipe, embedded_guidance=4.5)
    assert backbone.guidance == Guidance(mode="embedded", scale=4.5)
    seen: list[Tensor] = []
    backbone.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True
    )
    sample, timestep = random_sample(backbone), torch.full((BATCH,), 500.0)
    backbone.output(backbone.denoiser, sample, timestep, FLUX_DEV.condition())
    assert seen[0].tolist() == [4.5] * BATCH
    schnell = wrap_pipeline(FLUX_SCHNELL.build())
    assert schnell.guidance == Guidance()
    assert schnell.base("x").max_sequence_length == 256


@pytest.mark.parametrize(
    ("case", "own", "small"),
    [
        (SD15, (4, 16, 16), (4, 16, 32)),
        (SDXL, (4, 16, 16), (4, 16, 32)),
        (SD3, (4, 32, 32), (4, 16, 32)),
        (FLUX_DEV, (1, 128, 128), (1, 16, 32)),
        (PIXART, (4, 8, 8), (4, 16, 32)),
        (SANA, (4, 32, 32), (4, 16, 32)),
        (QWEN_IMAGE, (4, 128, 128), (4, 8, 16)),
        (Z_IMAGE, (16, 512, 512), (16, 16, 32)),
        (WAN21, (4, 21, 60, 104), (4, 21, 4, 8)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_latent_shapes(case: Case, own: tuple[int, ...], small: tuple[int, ...]) -> None:
    backbone = wrap_pipeline(case.build())
    assert backbone.latent_shape() == own
    assert backbone.latent_shape(HEIGHT_PX, WIDTH_PX) == small
    assert backbone.latent_shape(HEIGHT_PX)[-2:] == (small[-2], small[-2])


def test_sizes_that_do_not_exist_are_refused() -> None:
    images = LatentLayout(channels=4, height=64, width=64, factor=8, patch=2)
    with pytest.raises(ConfigError, match="height is 500 px, .* a multiple of 16; use 496"):
        images.shape(500)
    with pytest.raises(ConfigError, match="width is 8 px"):
        images.shape(512, 8)
    with pytest.raises(ConfigError, match="still images"):
        images.shape(512, 512, 5)
    video = LatentLayout(channels=4, height=8, width=8, factor=8, frames=21, frame_factor=4)
    assert video.shape(num_frames=1) == (4, 1, 8, 8)
    assert video.shape(num_frames=81) == (4, 21, 8, 8)
    with pytest.raises(ConfigError, match="got 80 frames, .* use 77"):
        video.shape(num_frames=80)


def test_packing_is_that_of_stock_flux() -> None:
    latents = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    packed = stock.FluxPipeline._pack_latents(latents, 2, 3, 8, 12)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 8, 12), latents)


def test_an_unknown_pipeline_class_is_one_sentence() -> None:
    pipe = stock.DDPMPipeline(unet=build_sd15().unet, scheduler=stock.DDPMScheduler())
    with pytest.raises(ConfigError) as caught:
        wrap_pipeline(pipe)
    text = str(caught.value)
    assert text.startswith("DDPMPipeline cannot be distilled yet; this release trains Flux")
    assert all(name in text for name in BACKBONES)


def test_a_folder_that_is_no_pipeline_is_one_sentence(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="could not be loaded as a diffusers pipeline"):
        load_backbone(str(tmp_path), precision=torch.float32, device=torch.device("cpu"))


def test_a_saved_pipeline_is_loaded_frozen(tmp_path: Any) -> None:
    SDXL.build().save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), precision=torch.bfloat16, device=torch.device("cpu"))
    assert backbone.family == "sdxl"
    assert backbone.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())


@pytest.mark.parametrize(
    ("settings", "build", "problem"),
    [
        ({"max_sequence_length": 77}, build_sd15, "the text length of StableDiffusionPipeline"),
        ({"embedded_guidance": 3.5}, build_sd3, "guidance is no input"),
        ({"embedded_guidance": 3.5}, build_flux, "guidance is no input"),
    ],
)
def test_a_setting_without_effect_is_refused(
    settings: dict[str, Any], build: Callable[[], Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        wrap_pipeline(build(), **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_betas_that_no_recipe_can_name_are_refused(changes: dict[str, Any]) -> None:
    pipe: Any = build_sd15()
    pipe.scheduler = stock.DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    with pytest.raises(ConfigError, match="StableDiffusionPipeline cannot be distilled: .*betas"):
        wrap_pipeline(pipe)


def test_stable_diffusion_2_is_a_family_of_its_own() -> None:
    pipe: Any = build_sd15()
    assert wrap_pipeline(pipe).family == "sd15"
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=1024)
    assert wrap_pipeline(pipe).family == "sd2"


def test_a_float16_sdxl_decodes_in_float32_as_stock_does() -> None:
    """Its autoencoder overflows in float16."""
    pipe: Any = SDXL.build().to(torch.float16)
    backbone: Backbone = wrap_pipeline(pipe)
    assert (backbone.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
