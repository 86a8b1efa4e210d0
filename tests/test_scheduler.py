"""FewStepScheduler: the recipe's grid, the step rule against diffusers' own, noise and config."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler

from fewstep.errors import PipelineError, RecipeError, ShapeError
from fewstep.recipe import FewStepRecipe, ResolutionShift, Schedule
from fewstep.schedulers import FewStepScheduler, NoiseLayout
from tests.tiny_pipelines import flow_recipe, vp_recipe

SHIFT_5 = (1000.0, 937.5, 2500.0 / 3.0, 625.0)


def normal(seed: int, shape: tuple[int, ...] = (2, 4, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(scheduler: Any, sample: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A whole trajectory with a stand-in network that depends on sample and timestep."""
    for timestep in scheduler.timesteps:
        output = torch.tanh(sample) * (0.5 + timestep / 2000.0)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **kwargs)[0]
    return sample


def test_the_grid_is_the_recipes_whatever_sigmas_and_mu_a_pipeline_passes() -> None:
    scheduler = FewStepScheduler(flow_recipe("wan", SHIFT_5))
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"num_inference_steps": 4},
        {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.47},
        {"timesteps": [999, 749, 499, 249]},
    )
    for kwargs in calls:
        scheduler.set_timesteps(**kwargs)
        assert scheduler.timesteps.tolist() == pytest.approx(SHIFT_5)
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9375, 0.83333333, 0.625, 0.0])
        assert scheduler.num_inference_steps == 4


def test_an_unsupported_step_count_is_one_clear_sentence() -> None:
    scheduler = FewStepScheduler(flow_recipe("flux", SHIFT_5))
    with pytest.raises(RecipeError, match="this model was not made for 28 steps; use 4"):
        scheduler.set_timesteps(28)
    with pytest.raises(RecipeError, match="28 steps"):
        scheduler.set_timesteps(sigmas=[1.0 - i / 28 for i in range(28)], mu=1.1)


def test_a_recipe_for_any_count_makes_grids_on_demand() -> None:
    scheduler = FewStepScheduler(vp_recipe("sd15", steps="any"))
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999.0, 499.0]


def test_the_config_is_the_recipe_and_survives_saving(tmp_path: Path) -> None:
    recipe = vp_recipe("sdxl", stochasticity=0.3)
    FewStepScheduler(recipe).save_pretrained(tmp_path)
    loaded: Any = FewStepScheduler.from_pretrained(tmp_path)
    assert loaded.recipe == recipe
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert FewStepRecipe.from_json(json.dumps(written["recipe"])) == recipe
    assert loaded.config.num_train_timesteps == 1000
    assert loaded.config.prediction_type == "epsilon"
    again: Any = FewStepScheduler.from_config(loaded.config)
    assert again.recipe == recipe


def test_without_stochasticity_a_flow_grid_is_a_plain_euler_loop() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3", SHIFT_5))
    expected = sample = normal(0)
    sigmas = [t / 1000.0 for t in SHIFT_5] + [0.0]
    for timestep, sigma, following in zip(SHIFT_5, sigmas, sigmas[1:], strict=False):
        velocity = torch.tanh(expected) * (0.5 + timestep / 2000.0)
        expected = expected + (following - sigma) * velocity
    torch.testing.assert_close(run(scheduler, sample), expected, rtol=1e-5, atol=1e-6)


def test_with_stochasticity_one_it_equals_diffusers_lcm_on_the_same_noise() -> None:
    grid = [999, 749, 499, 249]
    stock: Any = LCMScheduler()
    stock.set_timesteps(timesteps=grid)
    ours = FewStepScheduler(vp_recipe("sd15", stochasticity=1.0))
    expected = sample = normal(1)
    generator = torch.Generator().manual_seed(5)
    for timestep in stock.timesteps:
        output = torch.tanh(expected) * (0.5 + timestep / 2000.0)
        expected = stock.step(output, timestep, expected, generator, return_dict=False)[0]
    actual = run(ours, sample, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# TCD at gamma 1 stops at timestep 0, whose sigma is not quite 0; ours is LCM's clean data.
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 0.95])
def test_between_it_equals_diffusers_tcd_on_the_same_noise(gamma: float) -> None:
    grid = [999, 749, 499, 249]
    stock: Any = TCDScheduler()
    stock.set_timesteps(timesteps=grid)
    ours = FewStepScheduler(vp_recipe("sd15", stochasticity=gamma))
    expected = sample = normal(1)
    generator = torch.Generator().manual_seed(5)
    for timestep in stock.timesteps[:-1]:
        output = torch.tanh(expected) * (0.5 + timestep / 2000.0)
        expected = stock.step(
            output, timestep, expected, eta=gamma, generator=generator, return_dict=False
        )[0]
    ours_generator = torch.Generator().manual_seed(5)
    for timestep in ours.timesteps[:-1]:
        output = torch.tanh(sample) * (0.5 + timestep / 2000.0)
        sample = ours.step(output, timestep, sample, ours_generator, return_dict=False)[0]
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_the_last_step_gives_exactly_x0_without_noise(stochasticity: float) -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3", SHIFT_5, stochasticity=stochasticity))
    scheduler.set_begin_index(3)
    output = scheduler.step(normal(0), scheduler.timesteps[3], normal(1))
    assert torch.equal(output.prev_sample, output.pred_original_sample)
    torch.testing.assert_close(output.prev_sample, normal(1) - 0.625 * normal(0))


def test_the_second_value_of_the_tuple_is_x0() -> None:
    scheduler = FewStepScheduler(flow_recipe("pixart", SHIFT_5))
    _, x0 = scheduler.step(normal(0), 1000.0, normal(1), return_dict=False)
    torch.testing.assert_close(x0, normal(1) - normal(0))


def test_bound_generators_make_renoising_repeatable_without_passing_one() -> None:
    scheduler = FewStepScheduler(flow_recipe("flux", SHIFT_5, stochasticity=1.0))

    def picture(seeds: list[int]) -> torch.Tensor:
        scheduler.set_timesteps(4)
        with scheduler.bound([torch.Generator().manual_seed(seed) for seed in seeds]):
            return run(scheduler, torch.cat([normal(seed, (1, 4, 8, 8)) for seed in seeds]))

    assert torch.equal(picture([3, 4]), picture([3, 4]))
    assert torch.equal(picture([3, 4])[1:], picture([4]))
    assert not torch.equal(picture([3]), picture([4]))


def test_fresh_noise_is_the_float32_cpu_stream_of_each_image() -> None:
    scheduler = FewStepScheduler(flow_recipe("flux", SHIFT_5, stochasticity=1.0))
    sample = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    with scheduler.bound([torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]):
        got = scheduler.step(torch.zeros_like(sample), 1000.0, sample, return_dict=False)[0]
    expected = torch.stack([normal(7, (4, 8, 8)), normal(8, (4, 8, 8))])
    assert torch.equal(got, (0.9375 * expected).to(torch.bfloat16))


def test_packed_latents_get_the_image_shaped_draw_repacked() -> None:
    scheduler = FewStepScheduler(flow_recipe("flux", SHIFT_5, stochasticity=1.0))
    sample = torch.zeros(1, 64, 4)
    layout = NoiseLayout((4, 8, 8), lambda noise: noise.flatten(2).transpose(1, 2))
    with scheduler.bound(torch.Generator().manual_seed(7)):
        scheduler.add_noise_layout((64, 4), layout)
        got = scheduler.step(sample, 1000.0, sample, return_dict=False)[0]
    packed = normal(7, (1, 4, 8, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, 0.9375 * packed)


def test_a_wrong_number_of_generators_is_an_error() -> None:
    scheduler = FewStepScheduler(flow_recipe("flux", SHIFT_5, stochasticity=1.0))
    three = [torch.Generator() for _ in range(3)]
    with pytest.raises(PipelineError, match="3 generators for a batch of 2"):
        scheduler.step(normal(0), 1000.0, normal(1), three)


def test_steps_keep_the_samples_dtype() -> None:
    scheduler = FewStepScheduler(flow_recipe("wan", SHIFT_5))
    output = scheduler.step(normal(0).to(torch.bfloat16), 1000.0, normal(1))
    assert output.prev_sample.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_timesteps_find_their_index(dtype: torch.dtype) -> None:
    scheduler = FewStepScheduler(flow_recipe("wan", SHIFT_5))
    rounded = scheduler.timesteps.to(dtype)
    assert [scheduler.index_for_timestep(t) for t in rounded] == [0, 1, 2, 3]
    with pytest.raises(PipelineError, match="timestep 500 is not in this recipe's grid"):
        scheduler.index_for_timestep(500.0)


def test_one_step_too_many_is_an_error() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3", SHIFT_5))
    sample = run(scheduler, normal(0))
    with pytest.raises(PipelineError, match="more often than this grid's 4 steps"):
        scheduler.step(sample, 625.0, sample)


def test_a_learned_variance_left_in_the_output_is_an_error() -> None:
    scheduler = FewStepScheduler(vp_recipe("pixart"))
    with pytest.raises(ShapeError, match="drop a learned variance"):
        scheduler.step(torch.zeros(1, 8, 8, 8), 999, torch.zeros(1, 4, 8, 8))


def test_noise_added_at_a_grid_timestep_has_the_grids_sigma() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3", SHIFT_5))
    x0, noise = normal(0), normal(1)
    expected = (1 - 0.9375) * x0 + 0.9375 * noise
    torch.testing.assert_close(
        scheduler.scale_noise(x0, torch.tensor([937.5]), noise), expected, rtol=1e-5, atol=1e-6
    )
    both = scheduler.add_noise(x0, noise, torch.tensor([1000.0, 625.0]))
    torch.testing.assert_close(both[0], noise[0])
    torch.testing.assert_close(both[1], 0.375 * x0[1] + 0.625 * noise[1])


def test_noise_added_on_a_vp_schedule_equals_diffusers() -> None:
    stock: Any = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    ours = FewStepScheduler(vp_recipe("sd15"))
    at = torch.tensor([749, 100])
    torch.testing.assert_close(
        ours.add_noise(normal(0), normal(1), at),
        stock.add_noise(normal(0), normal(1), at),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_start_below_full_noise_scales_the_first_noise_to_its_sigma() -> None:
    schedule = vp_recipe("sdxl").base.schedule.build()
    scheduler = FewStepScheduler(vp_recipe("sdxl", timesteps=(399.0,)))
    assert scheduler.init_noise_sigma == pytest.approx(schedule.sigma_of_timestep(399.0))


def test_a_copy_made_inside_a_call_draws_on_from_the_same_generators() -> None:
    """LTX-2 copies its scheduler for the audio; neither noise nor hooks may be doubled."""
    scheduler = FewStepScheduler(flow_recipe("ltx2", SHIFT_5, stochasticity=1.0))
    seen: list[float] = []
    scheduler.before_call = lambda planned: seen.append(planned.level.sigma)
    generator = torch.Generator().manual_seed(3)
    with scheduler.bound(generator):
        twin = copy.deepcopy(scheduler)
        zeros = torch.zeros(1, 4, 8, 8)
        drawn = [s.step(zeros, 1000.0, zeros, return_dict=False)[0] for s in (scheduler, twin)]
    stream = torch.Generator().manual_seed(3)
    for one in drawn:
        noise = torch.randn(1, 4, 8, 8, generator=stream)
        torch.testing.assert_close(one, 0.9375 * noise)
    assert twin.before_call is scheduler.before_call
    twin.set_timesteps(4)
    assert scheduler.step_index == 1


def test_a_recipe_bound_to_the_size_is_not_run_without_one() -> None:
    shift = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
    recipe = flow_recipe(
        "flux", (1000.0, 500.0), schedule=Schedule(kind="flow", shift=1.0), resolution_shift=shift
    )
    scheduler = FewStepScheduler(recipe)
    zeros = torch.zeros(1, 4, 8, 8)
    with pytest.raises(PipelineError, match="depends on the image size, but .* passed no mu"):
        scheduler.step(zeros, 1000.0, zeros)
    scheduler.set_timesteps(2, mu=0.0)
    scheduler.step(zeros, 1000.0, zeros)


def test_a_plan_of_ones_own_is_run_as_it_is() -> None:
    scheduler = FewStepScheduler(flow_recipe("sd3", SHIFT_5))
    scheduler.install_plan(scheduler.plan[2:])
    assert scheduler.timesteps.tolist() == pytest.approx(SHIFT_5[2:])
    assert scheduler.num_inference_steps == 2
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(SHIFT_5)
