"""The doctor's probe: what it measures is what the network and the scheduler really get."""

from typing import Any

import pytest
import torch

from fewstep.doctor.noise import LEFT, SAME
from fewstep.doctor.probe import probe
from fewstep.doctor.seen import SeenRun
from fewstep.doctor.zero_data import zero_data_output
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Sampler
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    SD3,
    SD15,
    SDXL,
    WAN22,
    TinyFamily,
    record_denoiser,
    seen_timesteps,
    stock,
)

# diffusers' Euler turns tensors into arrays the way numpy 1 liked.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EACH_FAMILY = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def under_recipe(family: TinyFamily, **changes: Any) -> SeenRun:
    pipe = FewStepPipeline.wrap(family.build(), recipe=family.recipe(**changes))
    return probe(pipe, family.arguments(2))


@EACH_FAMILY
def test_a_recipe_is_measured_as_it_is_written(family: TinyFamily) -> None:
    recipe = family.recipe()
    run = under_recipe(family)
    grid = recipe.grids[0]
    assert run.error is None
    assert run.timesteps == pytest.approx(grid.timesteps)
    assert [step.calls[0].noise for step in run.steps] == pytest.approx(grid.sigmas[:-1], abs=1e-3)
    assert [run.told(i, 1000.0) for i in range(4)] == pytest.approx(grid.timesteps, abs=0.01)
    assert run.leftover == pytest.approx(0.0, abs=1e-3)
    assert (run.passes, run.nfe, run.num_images) == (1.0, 4, 2)
    assert run.is_repeatable


@EACH_FAMILY
@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_fresh_noise_is_measured(family: TinyFamily, stochasticity: float) -> None:
    run = under_recipe(family, stochasticity=stochasticity)
    kept = [step.kept for step in run.steps[:-1]]
    assert kept == pytest.approx([1.0 - stochasticity] * 3, abs=SAME if stochasticity else 1e-6)
    assert run.is_repeatable


def test_noise_that_starts_below_full_noise_is_measured() -> None:
    scaled = under_recipe(SD15, timesteps=(399.0,))
    level = SD15.recipe(timesteps=(399.0,)).grids[0].sigmas[0]
    assert scaled.steps[0].calls[0].noise == pytest.approx(level, rel=1e-3)
    unit = under_recipe(SD15, timesteps=(399.0,), sampler=Sampler(first_noise="unit"))
    assert unit.steps[0].calls[0].noise == pytest.approx(1.0)


@EACH_FAMILY
def test_the_probe_tells_what_a_hook_of_ones_own_sees_and_leaves_no_trace(
    family: TinyFamily,
) -> None:
    pipe: Any = FewStepPipeline.wrap(family.build(), recipe=family.recipe())
    pipe.set_progress_bar_config(disable=True)
    run = probe(pipe, family.arguments(1))
    assert "step" not in vars(pipe.scheduler)
    assert pipe._progress_bar_config == {"disable": True}
    assert not any(m._forward_hooks for m in pipe.components[family.denoisers[0]].modules())
    calls = record_denoiser(pipe, family)
    pipe(**family.arguments(1), seed=0)
    assert seen_timesteps(calls, family) == pytest.approx(
        [run.told(i, 1000.0) for i in range(4)], abs=0.01
    )


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_stock_schedulers_end_clean_for_data_of_zeros(
    scheduler: str, config: dict[str, Any]
) -> None:
    """The stand-in answers as each of them wants: else noise would be left, or too much removed.

    Not to the last digit: they begin with noise of deviation 1 at t = 999, whose sigma is 0.998.
    """
    pipe: Any = SDXL.build()
    pipe.scheduler = getattr(stock, scheduler)(**BETAS, **config)
    run = probe(pipe, SDXL.arguments(1) | {"num_inference_steps": 4, "guidance_scale": 1.0})
    schedule = SDXL.recipe().base.schedule.build()
    wanted = [schedule.sigma_of_timestep(t) for t in run.timesteps]
    assert [step.calls[0].noise for step in run.steps] == pytest.approx(wanted, abs=0.06)
    assert run.leftover is not None
    assert run.leftover < 0.07 < LEFT


def test_zero_data_is_what_the_prediction_means() -> None:
    """Against the definitions: v = alpha * epsilon - sigma * x0 at x0 = 0."""
    sample = 0.6 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = sample / 0.6
    for prediction, wanted in (("epsilon", noise), ("v_prediction", 0.8 * noise)):
        scheduler = stock.DDIMScheduler(prediction_type=prediction)
        torch.testing.assert_close(zero_data_output(scheduler, sample, 0.6), wanted)
    euler = stock.EulerDiscreteScheduler(prediction_type="v_prediction")
    alpha = (1.0 + 0.6**2) ** -0.5
    torch.testing.assert_close(zero_data_output(euler, sample, 0.6), alpha * noise)
    assert not zero_data_output(stock.DDIMScheduler(prediction_type="sample"), sample, 0.6).any()


def test_a_second_pass_is_counted_however_it_is_made() -> None:
    """SD3 doubles the batch, Wan calls its network twice."""
    negative = {"negative_prompt_embeds": SD3.arguments(2)["prompt_embeds"]}
    negative["negative_pooled_prompt_embeds"] = SD3.arguments(2)["pooled_prompt_embeds"]
    batch = probe(
        SD3.build(), SD3.arguments(2) | negative | {"num_inference_steps": 2, "guidance_scale": 4.0}
    )
    assert (batch.passes, len(batch.steps[0].calls), batch.nfe) == (2.0, 1, 4)
    call = WAN22.arguments(2)
    twice = probe(
        WAN22.build(),
        call
        | {"negative_prompt_embeds": call["prompt_embeds"]}
        | {"num_inference_steps": 2, "guidance_scale": 4.0},
    )
    assert (twice.passes, len(twice.steps[0].calls)) == (2.0, 2)


def test_long_runs_are_cut_short_and_failures_are_told() -> None:
    run = probe(SD3.build(), SD3.arguments(1) | {"num_inference_steps": 50, "guidance_scale": 1.0})
    assert (run.is_complete, len(run.steps), run.leftover) == (False, 10, None)
    broken = probe(SD3.build(), {"height": 33, "width": 32})
    assert broken.error is not None
    assert broken.error.startswith("ValueError: ")
    assert broken.steps == ()
