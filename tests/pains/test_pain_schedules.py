"""Pains 1, 2, 3, 4, 6, 8 and 18: the network is called at timesteps nobody trained."""

import inspect
import math
from typing import Any

import pytest
from diffusers import WanPipeline

from fewstep.doctor import examine
from fewstep.errors import RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe
from tests.pains.common import built, finding, network_timesteps
from tests.tiny_pipelines import QWEN_IMAGE, SANA, SD3, SDXL, WAN21, Z_IMAGE, TinyFamily

# diffusers' Euler turns tensors into arrays the way numpy 1 liked.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
OFF = {"guidance_scale": 1.0}
WAN_GRID = [1000.0, 937.5, 2500.0 / 3.0, 625.0]
DOUBLE_SHIFTED = [1000.0, 909.7, 717.3, 24.4]
Z_GRID = tuple(1000.0 * 3.0 * u / (1.0 + 2.0 * u) for u in (1, 7 / 8, 6 / 8, 5 / 8, 0.5, 3 / 8))
Z_GRID = (*Z_GRID, 500.0, 300.0)


def ours(family: TinyFamily, pipe: Any, recipe: FewStepRecipe, **call: Any) -> list[float]:
    return network_timesteps(FewStepPipeline.wrap(pipe, recipe=recipe), family, **call)


@pytest.mark.parametrize(("count", "first"), [(1, 1.0), (4, 751.0)])
def test_1_leading_spacing_never_shows_the_network_pure_noise(count: int, first: float) -> None:
    pipe = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
    call = OFF | {"num_inference_steps": count}
    assert network_timesteps(pipe, SDXL, **call)[0] == first

    found = examine(pipe, arguments=SDXL.arguments(1) | OFF, steps=count)
    assert f"timestep {first:g}" in finding(found, "grid/never-sees-noise").sentence
    left = finding(found, "noise/left-in-result").evidence["leftover"]
    assert left > (0.9 if count == 1 else 0.1)

    recipe = SDXL.recipe(timesteps=(999.0,) if count == 1 else (999.0, 749.0, 499.0, 249.0))
    assert ours(SDXL, pipe, recipe)[0] == 999.0


def test_2_lcm_calls_a_dmd2_model_between_its_timesteps_whatever_its_spacing_says() -> None:
    pipe = built(SDXL, "LCMScheduler", timestep_spacing="trailing")
    assert network_timesteps(pipe, SDXL, num_inference_steps=4, **OFF) == [999, 759, 499, 259]

    recipe = SDXL.recipe(stochasticity=1.0)
    found = examine(pipe, recipe=recipe, arguments=SDXL.arguments(1) | OFF)
    wrong = finding(found, "grid/not-trained").evidence
    assert (wrong["trained"][1], wrong["seen"][1]) == (749, 759)
    assert "'trailing'" in finding(found, "sampler/setting-not-read").sentence
    assert ours(SDXL, pipe, recipe) == [999, 749, 499, 249]


def test_3_flow_match_euler_shifts_its_default_grid_twice() -> None:
    pipe = built(SD3, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    seen = network_timesteps(pipe, SD3, num_inference_steps=4, **OFF)
    assert seen == pytest.approx([1000, 857.7, 602.2, 8.9], abs=0.05)

    found = examine(pipe, arguments=SD3.arguments(1) | OFF, steps=4)
    assert finding(found, "grid/double-shift").evidence["wanted"] == pytest.approx(
        [1000, 900, 750, 500]
    )
    finding(found, "grid/last-call-at-clean")
    recipe = SD3.recipe(timesteps=(1000.0, 900.0, 750.0, 500.0))
    assert ours(SD3, pipe, recipe) == [1000, 900, 750, 500]


def test_3_flow_match_euler_shifts_a_trained_grid_that_is_passed_to_it() -> None:
    pipe = built(SD3, "FlowMatchEulerDiscreteScheduler", shift=5.0)
    sigmas = [t / 1000.0 for t in WAN_GRID]
    seen = network_timesteps(pipe, SD3, sigmas=sigmas, num_inference_steps=4, **OFF)
    assert seen == pytest.approx([1000, 986.8, 961.5, 892.9], abs=0.05)

    call = SD3.arguments(1) | OFF | {"sigmas": sigmas}
    found = examine(pipe, recipe=SD3.recipe(), arguments=call)
    assert "the grid passed to it" in finding(found, "grid/double-shift").sentence


def test_3_timesteps_of_ones_own_leave_the_network_with_the_wrong_clock() -> None:
    pipe = built(SANA, "FlowMatchEulerDiscreteScheduler", shift=5.0)
    call = {"timesteps": WAN_GRID, "num_inference_steps": 4, **OFF}
    seen = network_timesteps(pipe, SANA, **call)
    assert seen == pytest.approx(WAN_GRID)  # and the samples?

    found = examine(pipe, arguments=SANA.arguments(1) | call)
    measured = finding(found, "grid/clock-disagrees").evidence["measured_sigma"]
    assert measured == pytest.approx([0.9868, 0.9615, 0.8929], abs=1e-4)
    healthy = examine(pipe, recipe=SANA.recipe(), arguments=SANA.arguments(1) | OFF).with_fewstep
    assert healthy is not None
    levels = [step.calls[0].noise for step in healthy.steps]
    assert levels == pytest.approx([t / 1000.0 for t in WAN_GRID])


def test_4_wan_has_no_argument_for_a_grid_and_its_own_spends_a_step_on_nothing() -> None:
    parameters = inspect.signature(WanPipeline.__call__).parameters
    assert not {"sigmas", "timesteps"} & set(parameters)
    pipe = built(WAN21, "FlowMatchEulerDiscreteScheduler", shift=5.0)
    seen = network_timesteps(pipe, WAN21, num_inference_steps=4, **OFF)
    assert seen == pytest.approx(DOUBLE_SHIFTED, abs=0.05)

    found = examine(pipe, recipe=WAN21.recipe(), arguments=WAN21.arguments(1) | OFF)
    assert finding(found, "grid/not-trained").evidence["trained"] == pytest.approx(WAN_GRID)
    assert "flow_shift=5, solver_order=1" in finding(found, "grid/double-shift").fix
    assert ours(WAN21, pipe, WAN21.recipe()) == pytest.approx(WAN_GRID)


@pytest.mark.parametrize("order", [1, 2])
def test_4_the_stock_way_out_for_wan_is_unipc_of_order_one(order: int) -> None:
    pipe = built(
        WAN21,
        "UniPCMultistepScheduler",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
        solver_order=order,
    )
    found = examine(pipe, recipe=WAN21.recipe(), arguments=WAN21.arguments(1) | OFF)
    assert found.as_called is not None
    assert found.as_called.timesteps == (999, 937, 833, 625)
    assert found.codes == (() if order == 1 else ("sampler/multistep",))


def test_6_qwen_lightning_needs_a_scheduler_without_shift_terminal() -> None:
    lightning = {
        "use_dynamic_shifting": True,
        "base_shift": math.log(3.0),
        "max_shift": math.log(3.0),
    }
    pipe = built(QWEN_IMAGE, "FlowMatchEulerDiscreteScheduler", shift_terminal=0.02, **lightning)
    seen = network_timesteps(pipe, QWEN_IMAGE, num_inference_steps=4, true_cfg_scale=1.0)
    stretch = (1.0 - 0.02) / (1.0 - 0.5)
    assert seen == pytest.approx(
        [1000.0 * (1.0 - stretch * (1.0 - s)) for s in (1.0, 0.9, 0.75, 0.5)], abs=0.01
    )

    recipe = QWEN_IMAGE.recipe(timesteps=(1000.0, 900.0, 750.0, 500.0))
    call = QWEN_IMAGE.arguments(1) | {"true_cfg_scale": 1.0}
    found = examine(pipe, recipe=recipe, arguments=call)
    assert "shift_terminal=None" in finding(found, "grid/shift-terminal").fix
    assert ours(QWEN_IMAGE, pipe, recipe) == pytest.approx([1000, 900, 750, 500])

    mended = built(QWEN_IMAGE, "FlowMatchEulerDiscreteScheduler", **lightning)
    assert examine(mended, recipe=recipe, arguments=call).codes == ()


def test_8_nine_steps_are_one_too_many_since_diffusers_0_39() -> None:
    off = {"guidance_scale": 0.0}
    pipe = built(Z_IMAGE, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert len(network_timesteps(pipe, Z_IMAGE, num_inference_steps=9, **off)) == 9

    recipe = Z_IMAGE.recipe(timesteps=Z_GRID)
    found = examine(pipe, recipe=recipe, steps=9, arguments=Z_IMAGE.arguments(1) | off)
    assert "made for 8" in finding(found, "grid/wrong-step-count").sentence
    wrapped = FewStepPipeline.wrap(pipe, recipe=recipe)
    assert network_timesteps(wrapped, Z_IMAGE) == pytest.approx(Z_GRID, abs=0.01)
    with pytest.raises(RecipeError, match="not made for 9 steps; use 8"):
        wrapped(**Z_IMAGE.arguments(1), num_inference_steps=9)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_18_another_spacing_moves_the_calls_of_a_distilled_model(setting: str) -> None:
    pipe = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="trailing", **{setting: True})
    seen = network_timesteps(pipe, SDXL, num_inference_steps=4, **OFF)
    assert abs(seen[2] - 499.0) > 50.0

    found = examine(pipe, recipe=SDXL.recipe(), arguments=SDXL.arguments(1) | OFF)
    assert setting in finding(found, "sampler/other-spacing").sentence
    finding(found, "grid/not-trained")
    assert ours(SDXL, pipe, SDXL.recipe()) == [999, 749, 499, 249]
    plain = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="trailing")
    assert examine(plain, recipe=SDXL.recipe(), arguments=SDXL.arguments(1) | OFF).codes == ()
