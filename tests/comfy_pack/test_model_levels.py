"""Recipe levels and MODEL levels are the same points, for flow and for Stable Diffusion."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fewstep.comfy_nodes.model_levels import (
    comfy_sigmas,
    levels_for,
    levels_of_model,
    levels_of_sigmas,
)
from fewstep.comfy_nodes.model_steps import image_tokens, model_steps, mu_for
from fewstep.comfy_nodes.sampling_limits import check_can_sample
from fewstep.errors import AdapterError, ConfigError, RecipeError
from fewstep.noise_schedule import Vp
from fewstep.recipe import (
    FewStepRecipe,
    Grid,
    Lora,
    ResolutionShift,
    Route,
    Sampler,
    Schedule,
    SecondStage,
    StepPolicy,
)
from fewstep.recipe_plan import plan_steps
from fewstep.trajectory import plain_steps
from tests.comfy_pack.stand_ins import (
    BaseModel,
    EdmSampling,
    FlowSampling,
    TableSampling,
    VTableSampling,
)
from tests.tiny.recipes import flow_recipe, vp_recipe

VP, FLOW = vp_recipe("sd15"), flow_recipe("sd3")


def grid_of(recipe: FewStepRecipe, **changes: object) -> FewStepRecipe:
    """A recipe with its one grid changed."""
    return dataclasses.replace(recipe, grids=(dataclasses.replace(recipe.grids[0], **changes),))


def test_a_flow_has_the_recipes_sigmas_whatever_the_models_shift() -> None:
    sigmas = comfy_sigmas(FLOW, FlowSampling(shift=8.0))
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(list(FLOW.grids[0].sigmas), abs=1e-7)


def test_a_table_gives_its_own_numbers() -> None:
    table = TableSampling()
    expected = [*(float(table.sigmas[int(t)]) for t in VP.grids[0].timesteps), 0.0]
    # up to the log and exp that the table is read with
    assert comfy_sigmas(VP, table).tolist() == pytest.approx(expected, rel=1e-6)
    assert comfy_sigmas(VP, VTableSampling()).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_sigma_that_is_not_its_timesteps_stays_the_recipes() -> None:
    sigmas = list(VP.grids[0].sigmas)
    sigmas[1] -= 0.9e-4  # the most that a recipe allows; here it is 0.04 % of the MODEL's sigma
    own = sigmas[1] / math.sqrt(1.0 - sigmas[1] ** 2)
    shifted = grid_of(VP, sigmas=tuple(sigmas))
    assert comfy_sigmas(shifted, TableSampling()).tolist()[1] == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("recipe", [VP, FLOW], ids=["vp", "flow"])
def test_levels_survive_the_way_to_the_model_and_back(recipe: FewStepRecipe) -> None:
    sampling = TableSampling() if recipe is VP else FlowSampling()
    levels = levels_of_sigmas(comfy_sigmas(recipe, sampling), sampling)
    for found, expected in zip(levels, recipe.levels(), strict=True):
        assert found.alpha == pytest.approx(expected.alpha, abs=1e-6)
        assert found.sigma == pytest.approx(expected.sigma, abs=1e-6)
        assert found.timestep == pytest.approx(expected.timestep, abs=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_models_own_schedule_plans_as_the_librarys(gamma: float) -> None:
    """Any sigmas, no recipe: the same weights as from the betas."""
    table = TableSampling()
    levels = levels_of_sigmas(comfy_sigmas(VP, table), table)
    planned = plain_steps(levels, levels_of_model(table).schedule, gamma)
    for ours, expected in zip(planned, plain_steps(VP.levels(), Vp(), gamma), strict=True):
        assert ours.weights.sample == pytest.approx(expected.weights.sample, abs=1e-5)
        assert ours.weights.x0 == pytest.approx(expected.weights.x0, abs=1e-5)
        assert ours.weights.noise == pytest.approx(expected.weights.noise, abs=1e-5)


def test_the_network_sees_the_sample_unscaled() -> None:
    """ComfyUI divides a table model's sample by sqrt(sigma^2 + 1)."""
    steps = model_steps(VP, plan_steps(VP), levels_for(VP, TableSampling()))
    for step in steps:
        assert step.is_plain
        assert step.scale / math.sqrt(step.sigma**2 + 1.0) == pytest.approx(1.0, abs=1e-12)


def clocked(read_at: str) -> FewStepRecipe:
    """A recipe of NitroSD's kind."""
    return grid_of(VP, clock=(249.0, 187.0, 124.0, 62.0), read_at=read_at)


@pytest.mark.parametrize("read_at", ["clock", "timesteps"])
def test_another_clock_is_told_and_read_as_the_recipe_says(read_at: str) -> None:
    """Whatever the network says is read as the recipe reads it, from what the MODEL reads."""
    recipe, table = clocked(read_at), TableSampling()
    plan = plan_steps(recipe)
    for step in model_steps(recipe, plan, levels_for(recipe, table)):
        assert float(table.timestep(torch.tensor(step.told_sigma))) == step.planned.level.timestep
        assert step.told_scale / math.sqrt(step.told_sigma**2 + 1.0) == pytest.approx(1.0)
        sample, output = 0.7, -0.4
        # as ComfyUI reads an epsilon: x - sigma * epsilon
        models = step.told_scale * sample - step.told_sigma * output
        found = step.of_sample * sample + step.of_x0 * models
        reading = step.planned.reading
        assert found == pytest.approx((sample - reading.sigma * output) / reading.alpha, rel=1e-6)


def test_rounded_timesteps_of_a_flow_are_told_and_read_apart() -> None:
    recipe = grid_of(FLOW, timesteps=(1000.0, 937.0, 833.0, 625.0))
    steps = model_steps(recipe, plan_steps(recipe), levels_for(recipe, FlowSampling()))
    assert [step.is_plain for step in steps] == [True, False, False, True]
    assert steps[1].told_sigma == pytest.approx(0.937)
    assert steps[1].sigma == pytest.approx(0.9375)
    sample, velocity = 0.5, 2.0
    models = sample - 0.937 * velocity
    found = steps[1].of_sample * sample + steps[1].of_x0 * models
    assert found == pytest.approx(sample - 0.9375 * velocity)


def test_a_clock_the_model_has_no_sigma_for_is_told_apart() -> None:
    recipe = grid_of(VP, clock=(1000.0, 750.0, 500.5, 250.0))  # PeRFlow's is like this
    steps = model_steps(recipe, plan_steps(recipe), levels_for(recipe, TableSampling()))
    assert [step.clock for step in steps] == [1000.0, None, 500.5, None]
    assert not any(step.is_plain for step in steps)


def test_a_model_that_rounds_timesteps_is_refused() -> None:
    class Distilled(TableSampling):
        def timestep(self, sigma: Tensor) -> Tensor:
            return super().timestep(sigma) // 20 * 20 + 19

    recipe = with_steps(999.0, 749.0)
    with pytest.raises(AdapterError, match="timestep 749, which MODEL turns into 759"):
        model_steps(recipe, plan_steps(recipe), levels_for(recipe, Distilled()))


def with_steps(*timesteps: float) -> FewStepRecipe:
    """An epsilon recipe of these steps."""
    return vp_recipe("sd15", timesteps=timesteps)


def test_another_base_is_refused() -> None:
    other = TableSampling(Vp(0.0001, 0.02, "linear"))
    with pytest.raises(AdapterError, match="so it is another base; load a sd15 checkpoint"):
        comfy_sigmas(VP, other)
    with pytest.raises(AdapterError, match=r"for an epsilon or v model \(sd15\).* is a flow model"):
        comfy_sigmas(VP, FlowSampling())
    with pytest.raises(AdapterError, match=r"for a flow model \(sd3\), but MODEL is an epsilon"):
        comfy_sigmas(FLOW, TableSampling())
    with pytest.raises(AdapterError, match="neither a flow model nor of the Stable Diffusion"):
        comfy_sigmas(VP, EdmSampling())


def test_sigmas_must_fall() -> None:
    with pytest.raises(ConfigError, match=r"Sigmas must fall: 0.75 is followed by 0.8 \(entry 3\)"):
        levels_of_sigmas(torch.tensor([1.0, 0.75, 0.8, 0.0]), FlowSampling())


def test_tokens_follow_the_patch_size() -> None:
    assert image_tokens(BaseModel(patch_size=2), (1, 16, 128, 96)) == 64 * 48
    assert image_tokens(BaseModel(patch_size=1), (2, 128, 64, 64)) == 64 * 64
    assert image_tokens(BaseModel(patch_size=(1, 2, 2)), (1, 16, 3, 9, 8)) == 3 * 5 * 4
    assert image_tokens(BaseModel(), (1, 16, 8, 8)) == 16


def test_a_size_dependent_shift_needs_the_size() -> None:
    shift = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
    recipe = flow_recipe("flux", schedule=FLOW.base.schedule, resolution_shift=shift)
    with pytest.raises(ConfigError, match="depend on the picture's size; connect the latent"):
        mu_for(recipe, BaseModel(patch_size=2), None, None)
    assert mu_for(FLOW, BaseModel(), None, None) is None
    assert mu_for(recipe, BaseModel(patch_size=2), (1, 16, 128, 128), None) == pytest.approx(1.15)
    sigmas = comfy_sigmas(recipe, FlowSampling(), mu=1.15).tolist()
    assert sigmas[1] == pytest.approx(shift.shifted(0.9375, 1.15), rel=1e-6)


SECOND = SecondStage(grid=Grid(timesteps=(500.0,), sigmas=(0.5, 0.0)))
TRIGFLOW = Schedule(kind="trigflow", sigma_data=0.5)
RENOISING = dataclasses.replace(FLOW, sampler=Sampler(stochasticity=1.0))
POLICY = StepPolicy(kind="gm", components=8, shift=3.2)
REFUSED = {
    "TrigFlow schedule": flow_recipe("sana", (1.5, 0.5), prediction="trigflow", schedule=TRIGFLOW),
    "predict a velocity, not x0": flow_recipe("sd3", prediction="x0"),
    "it has a second stage": dataclasses.replace(FLOW, second_stage=SECOND),
    "time a step ends at": dataclasses.replace(FLOW, sampler=Sampler(kind="flow_map")),
    "returns a policy": dataclasses.replace(FLOW, sampler=Sampler(kind="policy", policy=POLICY)),
    "grow from step to step": grid_of(RENOISING, sizes=(0.5, 0.5, 1.0, 1.0)),
    "which the prompt chooses": dataclasses.replace(
        FLOW, routes=(Route(adapter="a"), Route(adapter="b"))
    ),
    "LoRaD": dataclasses.replace(FLOW, lora=Lora(kind="lorad")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_recipes_beyond_the_sampler_are_refused(reason: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot sample this recipe: .*{reason}.*; sample it"):
        check_can_sample(REFUSED[reason])


def test_everything_else_is_sampled() -> None:
    for recipe in (VP, FLOW, RENOISING, clocked("clock")):
        check_can_sample(recipe)
