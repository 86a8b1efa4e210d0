"""Stock pipelines as denoisers: the boundary gives what the pipeline itself would sample."""

import copy
from typing import Any

import diffusers
import pytest
import torch

from fewstep.errors import PipelineError
from fewstep.noise_schedule import Level
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.call_arguments import fill_arguments
from fewstep.pipeline.pipeline_denoiser import ChunkedDenoiser, PipelineDenoiser
from fewstep.pipeline.stock_base import describe_base, describe_guidance
from fewstep.recipe import FewStepRecipe, Guidance
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.trajectory import sample_trajectory
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLUX,
    QWEN_IMAGE,
    SD3,
    SD15,
    WAN22,
    TinyFamily,
    record_denoiser,
)

stock: Any = diffusers
EVERY_FAMILY = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
SEEDS = (3, 4)


def guided(family: TinyFamily, pipe: Any) -> FewStepRecipe:
    """A recipe of the family's even grid whose prediction is what its stock scheduler says."""
    return family.recipe(base=describe_base(pipe), guidance=Guidance())


def denoiser_of(family: TinyFamily, pipe: Any, count: int = 2) -> PipelineDenoiser:
    arguments = fill_arguments(
        type(pipe), family.arguments(count), guided(family, pipe), num_steps=4, seed=None
    )
    return PipelineDenoiser(pipe, arguments)


@EVERY_FAMILY
def test_the_boundary_samples_what_the_pipeline_samples(family: TinyFamily) -> None:
    """Same grid, same seeds: the reference loop over the denoiser is FewStepPipeline's picture."""
    pipe = family.build()
    denoise, recipe = denoiser_of(family, pipe), guided(family, pipe)
    steps = plan_steps(recipe)
    noise = denoise.noise(SEEDS)
    ours = sample_trajectory(denoise, noise * first_noise_scale(recipe, steps[0].level), steps)

    wrapped: Any = FewStepPipeline.wrap(pipe, recipe=recipe)
    ends: list[torch.Tensor] = []
    wrapped.scheduler.refine_x0 = lambda x0, planned: (ends.append(x0), x0)[1]
    wrapped.set_progress_bar_config(disable=True)
    wrapped(**family.arguments(2), seed=list(SEEDS))
    assert ours.shape == ends[-1].shape
    torch.testing.assert_close(ours, ends[-1], rtol=1e-5, atol=1e-5)


@EVERY_FAMILY
def test_the_pipeline_is_left_as_it_was(family: TinyFamily) -> None:
    pipe: Any = family.build()
    scheduler, before = pipe.scheduler, copy.deepcopy(dict(pipe.config))
    denoise = denoiser_of(family, pipe)
    denoise(denoise.noise(SEEDS), Level(500.0, 0.5, 0.5))
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == before
    assert "encode_prompt" not in vars(pipe)


def test_the_network_is_told_the_level_and_sees_the_sample() -> None:
    pipe = SD15.build()
    calls = record_denoiser(pipe, SD15)
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    denoiser_of(SD15, pipe)(sample, Level(421.5, 0.7, 0.714))
    assert [float(t[0]) for _, t, _ in calls] == [421.5]
    assert torch.equal(calls[0][2], sample)


def test_each_transformer_of_wan_answers_its_own_noise() -> None:
    pipe = WAN22.build()
    calls = record_denoiser(pipe, WAN22)
    denoise = denoiser_of(WAN22, pipe)
    sample = denoise.noise(SEEDS)
    for sigma in (0.9, 0.8):
        denoise(sample, Level(1000 * sigma, 1 - sigma, sigma))
    assert [name for name, _, _ in calls] == ["transformer", "transformer", "transformer_2"]


def test_guidance_is_the_pipelines_own() -> None:
    """uncond + w (cond - uncond) of two single passes, by one guided pass."""
    pipe = SD3.build()
    arguments = SD3.arguments(2)
    prompt, pooled = arguments.pop("prompt_embeds"), arguments.pop("pooled_prompt_embeds")
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    level = Level(600.0, 0.4, 0.6)

    def x0(embeds: torch.Tensor, pooled: torch.Tensor, **more: Any) -> torch.Tensor:
        given = {**arguments, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **more}
        return PipelineDenoiser(pipe, {"guidance_scale": 1.0, **given})(sample, level)

    both = x0(
        prompt,
        pooled,
        guidance_scale=3.0,
        negative_prompt_embeds=-prompt,
        negative_pooled_prompt_embeds=-pooled,
    )
    cond, uncond = x0(prompt, pooled), x0(-prompt, -pooled)
    torch.testing.assert_close(both, uncond + 3.0 * (cond - uncond), rtol=1e-4, atol=1e-5)


def test_chunks_are_the_whole_batch() -> None:
    pipe = SD15.build()
    whole = denoiser_of(SD15, pipe, 2)
    arguments = SD15.arguments(2)
    embeds = arguments.pop("prompt_embeds")
    parts = [
        (PipelineDenoiser(pipe, {**arguments, "prompt_embeds": e[None], "guidance_scale": 1.0}), 1)
        for e in embeds
    ]
    sample, level = whole.noise(SEEDS), Level(800.0, 0.4, 0.9165)
    chunked = ChunkedDenoiser(parts)(sample, level)
    torch.testing.assert_close(chunked, whole(sample, level), rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_once() -> None:
    pipe: Any = SD15.build()
    count = 0
    encode = pipe.encode_prompt

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return encode(*args, **kwargs)

    pipe.__class__ = type("Counted", (type(pipe),), {"encode_prompt": staticmethod(counted)})
    denoise = denoiser_of(SD15, pipe)
    sample = denoise.noise(SEEDS)
    for timestep in (900.0, 500.0):
        denoise(sample, Level(timestep, 0.6, 0.8))
    assert count == 1


@pytest.mark.parametrize("family", [SD15, SD3, WAN22], ids=lambda family: family.name)
def test_half_precision_pipelines_are_asked_in_their_own_dtype(family: TinyFamily) -> None:
    pipe: Any = family.build()
    exact = denoiser_of(family, pipe)
    level = Level(600.0, 0.7, 0.714) if family.is_vp else Level(600.0, 0.4, 0.6)
    expected = exact(exact.noise(SEEDS), level)
    half = family.build().to(torch.bfloat16)
    arguments = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for name, value in family.arguments(2).items()
    }
    denoise = PipelineDenoiser(half, {**arguments, "guidance_scale": 1.0})
    noise = denoise.noise(SEEDS)
    assert noise.dtype == torch.float32
    # torch draws other numbers in half precision: compare on the same sample
    found = denoise(exact.noise(SEEDS), level)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_a_wrong_number_of_seeds_is_one_sentence() -> None:
    with pytest.raises(PipelineError, match="got 3 seeds for 2 images; pass one per image"):
        denoiser_of(SD15, SD15.build()).noise((1, 2, 3))


def test_bases_are_read_from_stock_schedulers() -> None:
    sd15, flux = describe_base(SD15.build()), describe_base(FLUX.build())
    assert (sd15.family, sd15.prediction, sd15.schedule.beta_start) == ("sd15", "epsilon", 0.00085)
    assert (flux.family, flux.prediction, flux.schedule.shift) == ("flux", "flow", 3.0)
    pipe: Any = SD15.build()
    pipe.scheduler = stock.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5
    )
    assert describe_base(pipe).schedule.shift == 2.5
    pipe.scheduler = stock.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(PipelineError, match="betas that no recipe knows"):
        describe_base(pipe)


def test_the_shift_that_follows_the_size_is_the_pipelines_own() -> None:
    pipe: Any = FLUX.build()
    pipe.scheduler = stock.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    seen: list[float] = []
    stepped = copy.deepcopy(pipe.scheduler)
    set_timesteps = stepped.set_timesteps

    def recorded(*args: Any, mu: float, **kwargs: Any) -> None:
        seen.append(mu)
        set_timesteps(*args, mu=mu, **kwargs)

    denoise = denoiser_of(FLUX, pipe)
    denoise.noise(SEEDS)
    stepped.set_timesteps = recorded
    # retrieve_timesteps looks at the signature for sigmas
    recorded.__wrapped__ = set_timesteps  # pyright: ignore[reportFunctionMemberAccess]
    pipe.scheduler = stepped
    pipe.set_progress_bar_config(disable=True)
    pipe(**FLUX.arguments(1), num_inference_steps=1)
    assert denoise.base.schedule.shift == pytest.approx(float(torch.tensor(seen[0]).exp()))


@pytest.mark.parametrize(
    ("family", "scale", "guidance"),
    [
        (SD15, None, Guidance(mode="cfg", scale=7.5, negative_prompt="works")),
        (SD3, 1.0, Guidance()),
        (FLUX, 2.0, Guidance(mode="embedded", scale=2.0)),
        (QWEN_IMAGE, None, Guidance(mode="cfg", scale=4.0, negative_prompt="works")),
    ],
)
def test_guidance_is_read_from_the_pipelines_signature(
    family: TinyFamily, scale: float | None, guidance: Guidance
) -> None:
    assert describe_guidance(family.build(), scale) == guidance
