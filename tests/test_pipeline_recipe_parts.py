"""Parts of a recipe that change what a pipeline does: clock, first noise, size, solver, stage."""

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LCMScheduler

from fewstep.errors import PipelineError, RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.few_step_class import few_step_class
from fewstep.recipe import (
    FewStepRecipe,
    Grid,
    ResolutionShift,
    Sampler,
    Schedule,
    SecondStage,
    SolverRow,
)
from fewstep.schedulers import FewStepScheduler
from fewstep.trajectory import PlannedStep
from tests.tiny.distilled import FLUX2_KLEIN
from tests.tiny.families import ALL_FAMILIES, FLUX, PIXART, QWEN_IMAGE, SD3, SD15, SDXL, WAN21
from tests.tiny.family import TinyFamily, record_denoiser, seen_timesteps
from tests.tiny.recipes import flow_recipe, vp_recipe
from tests.tiny.tasks import euler, trace
from tests.tiny.video import build_ltx, build_ltx_condition

INTERPOLATED = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
EMPIRICAL = ResolutionShift(rule="flux2_empirical")
UNSHIFTED = Schedule(kind="flow", shift=1.0)
EVEN = (1000.0, 750.0, 500.0, 250.0)


def wrapped(family: TinyFamily, recipe: FewStepRecipe, **kwargs: Any) -> FewStepPipeline:
    pipe = FewStepPipeline.wrap(family.build(), recipe=recipe, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_noise(family: TinyFamily, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, *family.latent_shape), generator=generator)


# --- the clock: NitroSD's network is told a fraction of the time its update runs on


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda f: f.name)
def test_the_network_is_told_the_clock_and_the_step_uses_the_grid(family: TinyFamily) -> None:
    plain = family.recipe()
    clock = tuple(t * 250.0 / 1000.0 for t in plain.grids[0].timesteps)
    slow = replace(plain, grids=(replace(plain.grids[0], clock=clock),))
    pipe = wrapped(family, slow)
    told, calls = record_denoiser(pipe, family), trace(pipe.components["unet"])
    result = pipe(**family.arguments(1), seed=1)[0]
    assert seen_timesteps(told, family) == pytest.approx(clock)
    levels = plain.levels()
    samples = [*(call.sample for call in calls[1:]), result]
    for index, (call, sample) in enumerate(zip(calls, samples, strict=True)):
        expected = euler(plain, call, levels[index], levels[index + 1])
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


# --- first noise: models published as one step from t = 399 or 800 were given noise of deviation 1


@pytest.mark.parametrize("start", [399.0, 800.0])
@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda f: f.name)
def test_a_unit_start_below_full_noise_is_what_stock_lcm_does(
    family: TinyFamily, start: float
) -> None:
    sampler = Sampler(stochasticity=1.0, first_noise="unit")
    ours = wrapped(family, vp_recipe(family.family, timesteps=(start,), sampler=sampler))
    stock: Any = family.build()
    stock.scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012)
    expected = stock(
        **family.arguments(1),
        timesteps=[int(start)],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(6),
    )[0]
    calls = record_denoiser(ours, family)
    picture = ours(**family.arguments(1), seed=6)[0]
    torch.testing.assert_close(calls[0][2], first_noise(family, 6))
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


def test_pixart_takes_the_prediction_of_its_one_step() -> None:
    """PixArt-DMD: the pipeline keeps `step(...)[1]` when there is one step."""
    recipe = vp_recipe(
        "pixart", timesteps=(400.0,), sampler=Sampler(stochasticity=1.0, first_noise="unit")
    )
    pipe = wrapped(PIXART, recipe)
    calls = trace(pipe.components["transformer"])
    picture = pipe(**PIXART.arguments(1), seed=6)[0]
    level = recipe.levels()[0]
    noise = first_noise(PIXART, 6)
    torch.testing.assert_close(calls[0].sample, noise)
    x0 = (noise - level.sigma * calls[0].output[:, :4]) / level.alpha
    torch.testing.assert_close(picture, x0, rtol=1e-4, atol=1e-4)


def test_unit_noise_in_a_flow_pipeline_is_left_as_drawn() -> None:
    sampler = Sampler(first_noise="unit")
    pipe = wrapped(SD3, flow_recipe("sd3", (800.0, 400.0), sampler=sampler))
    calls = record_denoiser(pipe, SD3)
    pipe(**SD3.arguments(1), seed=6)
    torch.testing.assert_close(calls[0][2], first_noise(SD3, 6))


def test_the_first_noise_is_scaled_for_the_step_count_of_the_call() -> None:
    """SD3 draws its noise before it tells the count; the last call's grid must not decide."""
    two, four = (flow_recipe("sd3", t).grids[0] for t in ((800.0, 400.0), EVEN))
    recipe = replace(flow_recipe("sd3"), grids=(two, four))
    pipe = wrapped(SD3, recipe)
    calls = record_denoiser(pipe, SD3)
    for steps, scale in ((2, 0.8), (4, 1.0), (2, 0.8)):
        del calls[:]
        pipe(**SD3.arguments(1), num_inference_steps=steps, seed=6)
        torch.testing.assert_close(calls[0][2], scale * first_noise(SD3, 6))


# --- resolution_shift: the pipeline's mu moves the grid


def tokens_of(family: TinyFamily, pixels: int) -> int:
    latents = pixels // 2 if family is not QWEN_IMAGE else pixels // 4
    patch = 1 if family is SD3 else 2
    return (latents // patch) ** 2


@pytest.mark.parametrize("family", [FLUX, QWEN_IMAGE, SD3, FLUX2_KLEIN], ids=lambda f: f.name)
def test_the_network_sees_the_grid_shifted_for_the_size(family: TinyFamily) -> None:
    shift = EMPIRICAL if family is FLUX2_KLEIN else INTERPOLATED
    recipe = flow_recipe(family.family, EVEN, schedule=UNSHIFTED, resolution_shift=shift)
    pipe = wrapped(family, recipe)
    calls = record_denoiser(pipe, family)
    seen = []
    for pixels in (32, 64):
        del calls[:]
        pipe(**{**family.arguments(1), "height": pixels, "width": pixels}, seed=0)
        seen.append(seen_timesteps(calls, family))
        exp_mu = math.exp(shift.mu(tokens_of(family, pixels), 4))
        sigmas = [exp_mu / (exp_mu + 1000.0 / t - 1.0) for t in EVEN]
        assert seen[-1] == pytest.approx([1000.0 * s for s in sigmas], rel=1e-5)
    assert seen[0] != pytest.approx(seen[1])


def test_a_pipeline_that_passes_no_mu_is_an_error_not_an_unshifted_picture() -> None:
    recipe = flow_recipe("wan", EVEN, schedule=UNSHIFTED, resolution_shift=INTERPOLATED)
    pipe = wrapped(WAN21, recipe)
    with pytest.raises(PipelineError, match="depends on the image size, but .* passed no mu"):
        pipe(**WAN21.arguments(1), seed=0)


@pytest.mark.parametrize(
    ("family", "shift"), [(FLUX, EMPIRICAL), (FLUX2_KLEIN, INTERPOLATED)], ids=["flux", "flux2"]
)
def test_a_mu_of_another_rule_is_refused(family: TinyFamily, shift: ResolutionShift) -> None:
    recipe = flow_recipe(family.family, EVEN, schedule=UNSHIFTED, resolution_shift=shift)
    with pytest.raises(PipelineError, match="computes mu by"):
        wrapped(family, recipe)


def test_a_size_bound_start_below_full_noise_is_refused() -> None:
    recipe = flow_recipe("flux", (800.0, 400.0), schedule=UNSHIFTED, resolution_shift=INTERPOLATED)
    with pytest.raises(PipelineError, match="draws its first noise before it computes mu"):
        wrapped(FLUX, recipe)


def test_flux2_draws_fresh_noise_image_shaped() -> None:
    recipe = flow_recipe("flux2", EVEN, stochasticity=1.0)
    pipe = wrapped(FLUX2_KLEIN, recipe)
    calls = trace(pipe.components["transformer"])
    pipe(**FLUX2_KLEIN.arguments(1), seed=5)
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(1, *FLUX2_KLEIN.latent_shape, generator=generator) for _ in range(4)]
    rows = [n.flatten(2).transpose(1, 2) for n in noise]
    torch.testing.assert_close(calls[0].sample, rows[0])
    for i in (1, 2, 3):
        sigma, now = EVEN[i] / 1000.0, EVEN[i - 1] / 1000.0
        x0 = calls[i - 1].sample - now * calls[i - 1].output
        expected = (1.0 - sigma) * x0 + sigma * rows[i]
        torch.testing.assert_close(calls[i].sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stock", "shape", "arguments"),
    [
        (diffusers.FluxPipeline, (4, 8, 6), (1, 4, 8, 6)),
        (diffusers.Krea2Pipeline, (4, 8, 6), (1, 4, 8, 6)),  # a method; the others are static
        (diffusers.Flux2KleinPipeline, (16, 4, 3), ()),
        (diffusers.LTXPipeline, (4, 2, 4, 6), (2, 1)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_kind_of_packing_tells_the_scheduler_how_noise_is_packed(
    stock: Any, shape: tuple[int, ...], arguments: tuple[int, ...]
) -> None:
    pipe: Any = object.__new__(few_step_class(FewStepPipeline, stock))
    scheduler = FewStepScheduler(flow_recipe("flux", EVEN, stochasticity=1.0))
    vars(pipe).update(patch_size=2, scheduler=scheduler)
    bare: Any = object.__new__(stock)
    vars(bare).update(patch_size=2)
    latents = torch.randn(1, *shape)
    with scheduler.bound(torch.Generator().manual_seed(3)):
        packed = pipe._pack_latents(latents, *arguments)
        assert torch.equal(packed, bare._pack_latents(latents, *arguments))
        zeros = torch.zeros_like(packed)
        moved = scheduler.step(zeros, 1000.0, zeros, return_dict=False)[0]
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moved, 0.75 * bare._pack_latents(noise, *arguments))


# --- fitted solvers run in every family


def multistep_rows(recipe: FewStepRecipe) -> tuple[SolverRow, ...]:
    """Any rows of a memory; not a good solver, but each weight shows."""
    first = SolverRow(sample=0.6, x0=0.3)
    rest = [
        SolverRow(sample=0.5, x0=0.3, previous_sample=-0.1, previous_x0=0.2 * i)
        for i in range(1, recipe.grids[0].num_steps)
    ]
    return (first, *rest)


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda f: f.name)
def test_fitted_rows_are_the_steps_in_every_family(family: TinyFamily) -> None:
    recipe = family.recipe()
    rows = multistep_rows(recipe)
    pipe = wrapped(family, replace(recipe, grids=(replace(recipe.grids[0], solver=rows),)))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scheduler: Any = pipe.scheduler
    step = scheduler.step

    clean: list[torch.Tensor] = []

    def watch_x0(x0: torch.Tensor, planned: PlannedStep) -> torch.Tensor:
        clean.append(x0)
        return x0

    def watch(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any):
        result = step(output, timestep, sample, *args, **kwargs)
        seen.append((sample, clean[-1], result[0]))
        return result

    scheduler.step, scheduler.refine_x0 = watch, watch_x0
    pipe(**family.arguments(1), seed=2)
    assert len(seen) == 4
    for i, (row, (sample, x0, moved)) in enumerate(zip(rows, seen, strict=True)):
        expected = row.sample * sample + row.x0 * x0
        if i:
            expected = expected + row.previous_sample * seen[i - 1][0]
            expected = expected + row.previous_x0 * seen[i - 1][1]
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


# --- second stage (LTX)


def two_stages() -> FewStepRecipe:
    first = Grid(timesteps=(1000.0, 750.0), sigmas=(1.0, 0.75, 0.0))
    second = Grid(timesteps=(909.4, 725.0), sigmas=(0.9094, 0.725, 0.0))
    recipe = flow_recipe("ltx", (1000.0, 750.0), schedule=UNSHIFTED)
    return replace(recipe, grids=(first,), second_stage=SecondStage(grid=second))


def test_stage_two_starts_from_latents_noised_to_its_first_sigma() -> None:
    stage_1 = FewStepPipeline.wrap(build_ltx_condition(), recipe=two_stages())
    arguments = ltx_arguments()
    small = stage_1(**arguments, seed=1)[0]
    assert [round(t) for t in timesteps_of(stage_1)] == [1000, 750]
    stage_2 = FewStepPipeline.wrap(build_ltx_condition(), recipe=two_stages(), stage=2)
    calls = trace(stage_2.components["transformer"])
    large = torch.nn.functional.interpolate(small, scale_factor=(1, 2, 2))
    sizes = {"height": 2 * arguments["height"], "width": 2 * arguments["width"]}
    stage_2(**{**arguments, **sizes}, latents=large, seed=7)
    assert [call.timestep for call in calls] == pytest.approx([909.4, 725.0])
    noise = torch.randn(large.shape, generator=torch.Generator().manual_seed(7))
    expected = 0.9094 * noise + (1.0 - 0.9094) * large
    packed = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(calls[0].sample, packed, rtol=1e-5, atol=1e-5)


def ltx_arguments() -> dict[str, Any]:
    return {
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
        "prompt_embeds": torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)),
        "prompt_attention_mask": torch.ones(1, 6),
        "guidance_scale": 1.0,
    }


def timesteps_of(pipe: FewStepPipeline) -> list[float]:
    scheduler: Any = pipe.scheduler
    return scheduler.timesteps.tolist()


def test_a_pipeline_without_latents_still_takes_noise_at_stage_two() -> None:
    pipe = FewStepPipeline.wrap(build_ltx(), recipe=two_stages(), stage=2)
    calls = trace(pipe.components["transformer"])
    pipe(**ltx_arguments(), seed=7)
    noise = torch.randn((1, 4, 3, 4, 4), generator=torch.Generator().manual_seed(7))
    packed = noise.flatten(2).transpose(1, 2)
    torch.testing.assert_close(calls[0].sample, 0.9094 * packed, rtol=1e-5, atol=1e-5)


def test_a_stage_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RecipeError, match="this recipe has one stage"):
        FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe(), stage=2)
    with pytest.raises(PipelineError, match="stage is 3; a recipe has stage 1"):
        FewStepPipeline.wrap(build_ltx(), recipe=two_stages(), stage=3)


def test_ltx2_latents_are_noised_by_the_pipelines_own_argument() -> None:
    from fewstep.pipeline.call_arguments import fill_arguments

    given = {"latents": torch.zeros(1, 4, 2, 2, 2), "prompt": "x"}
    recipe = replace(two_stages(), base=replace(two_stages().base, family="ltx2"))
    filled = fill_arguments(
        diffusers.LTX2Pipeline, given, recipe.for_second_stage(), num_steps=2, seed=None
    )
    assert filled["noise_scale"] == 0.9094
    whole = fill_arguments(diffusers.LTX2Pipeline, given, recipe, num_steps=2, seed=None)
    assert "noise_scale" not in whole
