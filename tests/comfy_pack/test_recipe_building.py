"""Recipes out of widgets."""

import pytest

from fewstep.comfy_nodes.presets import find_preset
from fewstep.comfy_nodes.recipe_building import AS_IT_IS, Changes, changed_recipe, custom_recipe
from fewstep.errors import FewstepError
from fewstep.recipe import FewStepRecipe
from tests.tiny.recipes import flow_recipe

DMD2 = "999, 749, 499, 249"


def recipe_of(name: str) -> FewStepRecipe:
    return find_preset(name).recipe


def test_nothing_set_changes_nothing() -> None:
    assert Changes().names == ()
    for name in ("dmd2-sdxl-4step-lora", "wan2.2-lightning-t2v-a14b", "flux1-schnell"):
        assert changed_recipe(recipe_of(name), Changes()) == recipe_of(name)


def test_a_custom_recipe_can_be_the_preset() -> None:
    preset = recipe_of("dmd2-sdxl-4step-lora")
    ours = custom_recipe("sdxl", AS_IT_IS, Changes(timesteps=DMD2, stochasticity=1.0))
    assert ours.sampler == preset.sampler
    assert ours.guidance == preset.guidance
    assert ours.base.schedule == preset.base.schedule
    assert ours.grid().timesteps == preset.grid().timesteps
    assert ours.grid().sigmas == pytest.approx(preset.grid().sigmas, abs=1e-6)


def test_sigmas_are_comfyuis() -> None:
    """Noise over signal for Stable Diffusion, so its largest is about 14.6."""
    by_time = custom_recipe("sd15", AS_IT_IS, Changes(timesteps=DMD2))
    listed = [level.sigma / level.alpha for level in by_time.levels()]
    text = ", ".join(f"{sigma:.6f}" for sigma in listed)
    by_sigma = custom_recipe("sd15", AS_IT_IS, Changes(sigmas=text))
    assert listed[0] == pytest.approx(14.6146, rel=1e-4)
    assert by_sigma.grid().timesteps == pytest.approx(by_time.grid().timesteps, abs=1e-2)
    flow = custom_recipe("wan", AS_IT_IS, Changes(sigmas="[1.0, 0.9375; 0.625\n0]"))
    assert flow.grid().sigmas == (1.0, 0.9375, 0.625, 0.0)
    assert flow.grid().timesteps == (1000.0, 937.5, 625.0)


def test_equal_steps_of_a_flow_model_are_shifted_once() -> None:
    ours = custom_recipe("wan", AS_IT_IS, Changes(steps=4, shift=5.0))
    assert ours.grid().timesteps == pytest.approx((1000.0, 937.5, 2500 / 3, 625.0))
    assert ours.base.schedule.shift == 5.0


def test_a_written_list_is_not_shifted_again() -> None:
    ours = custom_recipe("wan", AS_IT_IS, Changes(timesteps="1000, 625", shift=5.0))
    assert ours.grid().timesteps == (1000.0, 625.0)
    assert ours.base.schedule.shift == 5.0


def test_guidance_is_told_to_networks_that_are_told_it() -> None:
    flux = custom_recipe("flux", AS_IT_IS, Changes(steps=4, shift=1.0, guidance=3.5))
    assert (flux.guidance.mode, flux.guidance.scale) == ("embedded", 3.5)
    sdxl = custom_recipe("sdxl", AS_IT_IS, Changes(steps=4, guidance=2.0))
    assert (sdxl.guidance.mode, sdxl.guidance.negative_prompt) == ("cfg", "works")
    assert custom_recipe("sdxl", AS_IT_IS, Changes(steps=4, guidance=1.0)).guidance.mode == "none"


def test_guidance_of_a_preset_keeps_its_kind() -> None:
    told = changed_recipe(recipe_of("fasthunyuan"), Changes(guidance=4.0)).guidance
    assert (told.mode, told.scale) == ("embedded", 4.0)
    off = changed_recipe(recipe_of("pcm-sdxl-normalcfg-4step"), Changes(guidance=1.0)).guidance
    assert (off.mode, off.scale) == ("none", 1.0)


def test_another_grid_gives_each_step_to_the_expert_of_its_noise() -> None:
    ours = changed_recipe(
        recipe_of("wan2.2-lightning-t2v-a14b"), Changes(timesteps="1000, 900, 880, 500, 200")
    )
    assert ours.grid().experts == (0, 0, 0, 1, 1)
    shifted = changed_recipe(recipe_of("wan2.2-lightning-t2v-a14b"), Changes(shift=8.0))
    assert shifted.grid().num_steps == 4
    assert shifted.grid().sigmas[1] == pytest.approx(0.96)


def test_a_step_count_is_one_the_recipe_lists() -> None:
    assert changed_recipe(recipe_of("flux1-schnell"), Changes(steps=2)).grid().num_steps == 2
    any_count = flow_recipe("wan", steps="any")
    assert changed_recipe(any_count, Changes(steps=7)).grid().num_steps == 7


def test_a_size_dependent_shift_goes_with_the_grid_it_was_for() -> None:
    klein = recipe_of("flux2-klein-4b")
    assert klein.resolution_shift is not None
    assert changed_recipe(klein, Changes(sigmas="1, 0.5, 0")).resolution_shift is None


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sdxl", Changes(), 'needs its steps: write timesteps such as "999, 749, 499, 249"'),
        ("wan", Changes(steps=4), r"Equal steps of a flow model \(Wan\) need its shift"),
        ("sdxl", Changes(timesteps=DMD2, sigmas="1, 0"), "both written; clear one of them"),
        ("sdxl", Changes(timesteps="999, 750, 760"), r"750 is followed by 760 \(entry 3\)"),
        ("sdxl", Changes(timesteps="999, x"), "'x' is not a number"),
        ("sdxl", Changes(timesteps="1000, 500"), "timestep 1000 is outside this schedule"),
        ("sdxl", Changes(sigmas="14.6, 0.625"), r"The list ends at 0\.625; add 0\."),
        ("wan", Changes(sigmas="0.75, 0.8, 0"), r"0\.75 is followed by 0\.8 \(entry 2\)"),
        ("wan", Changes(sigmas="1"), "One sigma is no step"),
        ("wan", Changes(timesteps="1000, 0"), "Timestep 0 of a flow model is clean data"),
        ("sdxl", Changes(steps=3, timesteps=DMD2), "steps=3, but 4 steps are written out"),
        ("sdxl", Changes(steps=4, shift=3.0), "shift=3, but SDXL is no flow model"),
        ("x", Changes(steps=4), "Base family 'x' is unknown; use one of sd15"),
    ],
)
def test_what_makes_no_recipe_says_what_to_do(family: str, changes: Changes, message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        custom_recipe(family, AS_IT_IS, changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dmd2-sdxl-4step-lora", Changes(steps=6), r"trained for exactly 4\. Allowed: 4\."),
        ("flux1-schnell", Changes(steps=6), r"a few counts only\. Allowed: 1, 2, 3, 4\."),
        ("dmd2-sdxl-4step-lora", Changes(shift=3.0), "SDXL is no flow model"),
        ("perflow-sd15-dreamshaper", Changes(stochasticity=1.0), "write stochasticity 0"),
    ],
)
def test_changes_that_contradict_a_preset_say_so(name: str, changes: Changes, message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        changed_recipe(recipe_of(name), changes)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_the_prediction_can_be_said(prediction: str) -> None:
    ours = custom_recipe("sdxl", prediction, Changes(timesteps="900, 500"))
    assert ours.base.prediction == prediction
    assert ours.base.schedule.kind == ("flow" if prediction == "flow" else "vp")
