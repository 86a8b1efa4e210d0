"""Our SAMPLER in ComfyUI: equal to FewStepPipeline and, where core has the same, to core."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import AdapterError, ConfigError, RecipeError
from fewstep.recipe import FewStepRecipe, Grid, ResolutionShift, Sampler, SolverRow, StepPolicy
from fewstep.recipe_plan import plan_steps
from fewstep.trajectory import sample_trajectory
from tests.comfy.harness import Comfy
from tests.comfy.references import (
    PROMPT_SEED,
    image_to_image,
    inpainting,
    latent_scale,
    network_scale,
    reference,
    relative_error,
)
from tests.comfy.sampler_bench import BOTH, CLOSE, GAMMAS, SEED, Bench, bench, recipe_of, with_grid
from tests.comfy.testkit import conditioning, latents
from tests.comfy.tiny_models import SD3, SD15, TinyModel
from tests.tiny.recipes import SD_SCHEDULE


@BOTH
@GAMMAS
def test_equals_the_pipeline(comfy: Comfy, model: TinyModel, gamma: float) -> None:
    recipe = recipe_of(model, gamma)
    got = bench(comfy, model).sample(recipe)
    assert relative_error(got, reference(model, recipe, seed=SEED)) < CLOSE


def _late(recipe: FewStepRecipe) -> FewStepRecipe:
    """Starts at 799, from noise of deviation 1."""
    levels = recipe.base.schedule.build()
    timesteps = (799.0, 499.0, 249.0)
    sigmas = (*(levels.sigma_of_timestep(t) for t in timesteps), 0.0)
    return dataclasses.replace(
        recipe,
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=3,
        sampler=Sampler(stochasticity=1.0, first_noise="unit"),
    )


def _tcd(recipe: FewStepRecipe) -> FewStepRecipe:
    """Ends at the first training step."""
    sigmas = recipe.grids[0].sigmas
    end = recipe.base.schedule.build().sigma_of_timestep(0.0) or 0.004
    sampler = Sampler(stochasticity=0.3, first_noise="unit")
    changed = with_grid(recipe, sigmas=(*sigmas[:-1], end))
    return dataclasses.replace(changed, sampler=sampler)


ROWS = (
    SolverRow(sample=0.9, x0=0.2),
    SolverRow(sample=0.8, x0=0.4, previous_x0=-0.1),
    SolverRow(sample=0.6, x0=0.7, previous_sample=0.05, previous_x0=-0.2),
    SolverRow(sample=0.0, x0=1.0),
)
CLOCK = (499.0, 374.0, 249.0, 124.0)
ODD: dict[str, Callable[[FewStepRecipe], FewStepRecipe]] = {
    "starts late": _late,
    "tcd": _tcd,
    "solver": lambda recipe: with_grid(recipe, solver=ROWS),
    "stops": lambda recipe: with_grid(recipe, stops=(0.7, 0.5, 0.2, 0.0)),
    "clock": lambda recipe: with_grid(recipe, clock=CLOCK),
    "clock between timesteps": lambda recipe: with_grid(
        recipe, clock=(1000.0, 750.5, 499.0, 249.25), solver=ROWS
    ),
    "read at clock": lambda recipe: dataclasses.replace(
        with_grid(recipe, clock=CLOCK, read_at="clock"), sampler=Sampler(stochasticity=1.0)
    ),
    "clipped": lambda recipe: dataclasses.replace(
        recipe, sampler=Sampler(stochasticity=0.3, clip_x0=0.8)
    ),
    "corrected": lambda recipe: dataclasses.replace(
        recipe, sampler=Sampler(noise_correction=True, first_noise="unit")
    ),
}


@BOTH
@pytest.mark.parametrize("name", ODD)
def test_everything_a_recipe_can_say(comfy: Comfy, model: TinyModel, name: str) -> None:
    recipe = ODD[name](recipe_of(model))
    got = bench(comfy, model).sample(recipe)
    assert relative_error(got, reference(model, recipe, seed=SEED)) < CLOSE


@BOTH
def test_equals_a_plain_loop(comfy: Comfy, model: TinyModel) -> None:
    """The library's reference loop around the diffusers network itself."""
    recipe = recipe_of(model, 1.0)
    here = bench(comfy, model)
    expected = plain_loop(here, recipe, plan_steps(recipe))
    assert relative_error(here.sample(recipe), expected) < CLOSE


def test_a_shift_by_size_is_followed(comfy: Comfy) -> None:
    shift = ResolutionShift(base_shift=0.2, max_shift=0.9, base_tokens=4, max_tokens=32)
    recipe = dataclasses.replace(recipe_of(SD3, 1.0), resolution_shift=shift)
    here = bench(comfy, SD3)
    mu = shift.mu(16, 4)  # 8 x 8 latents in patches of 2
    sampler, sigmas = here.build(recipe, latent_shape=here.empty().shape)
    expected = plain_loop(here, recipe, plan_steps(recipe, mu=mu))
    assert relative_error(here.run(sampler, sigmas), expected) < CLOSE
    with pytest.raises(ConfigError, match="depend on the picture's size"):
        here.build(recipe)


def plain_loop(here: Bench, recipe: FewStepRecipe, plan: Any) -> Tensor:
    pipe = here.model.pipeline()
    network = pipe.components[here.model.component]
    made = conditioning(PROMPT_SEED, **here.model.conditioning)
    generator = torch.Generator().manual_seed(SEED)

    def draw_noise(size: float = 1.0) -> Tensor:
        return torch.randn(here.empty().shape, generator=generator)

    def denoise(sample: Tensor, level: Any) -> Tensor:
        timestep = torch.tensor([level.timestep])
        pooled = {"pooled_projections": made["pooled"]} if "pooled" in made else {}
        output = network(
            sample, timestep=timestep, encoder_hidden_states=made["cond"], **pooled
        ).sample
        if recipe.base.prediction == "flow":
            return sample - level.sigma * output
        return (sample - level.sigma * output) / level.alpha

    first = plan[0].level.sigma * draw_noise()
    return sample_trajectory(denoise, first, plan, draw=draw_noise)


@BOTH
def test_without_stochasticity_it_is_core_euler(comfy: Comfy, model: TinyModel) -> None:
    import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

    from fewstep.comfy_nodes.step_loop import stochastic_sampler

    here = bench(comfy, model)
    _, sigmas = here.build(recipe_of(model))
    ours = here.run(stochastic_sampler(0.0, "reproducible (CPU)"), sigmas)
    core = here.run(samplers.ksampler("euler"), sigmas)
    assert relative_error(ours, core) < 1e-6


@BOTH
def test_with_comfyuis_noise_it_is_core_lcm(comfy: Comfy, model: TinyModel) -> None:
    import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

    from fewstep.comfy_nodes.step_loop import stochastic_sampler

    here = bench(comfy, model)
    _, sigmas = here.build(recipe_of(model))
    ours = here.run(stochastic_sampler(1.0, "ComfyUI default"), sigmas)
    core = here.run(samplers.ksampler("lcm"), sigmas)
    assert relative_error(ours, core) < 1e-6


@BOTH
@GAMMAS
def test_the_free_sampler_agrees_with_the_recipes(
    comfy: Comfy, model: TinyModel, gamma: float
) -> None:
    """From core's first sample, which is noise of deviation 1."""
    from fewstep.comfy_nodes.step_loop import stochastic_sampler

    here = bench(comfy, model)
    recipe = recipe_of(model, gamma, first_noise="unit")
    sampler, sigmas = here.build(recipe)
    free = here.run(stochastic_sampler(gamma, "reproducible (CPU)"), sigmas)
    assert relative_error(free, here.run(sampler, sigmas)) < CLOSE


@BOTH
@GAMMAS
@pytest.mark.parametrize("at", [1, 3])
def test_split_sigmas_change_nothing(comfy: Comfy, model: TinyModel, gamma: float, at: int) -> None:
    """The second part has no noise and no seed, as DisableNoise gives it."""
    here = bench(comfy, model)
    sampler, sigmas = here.build(recipe_of(model, gamma))
    whole = here.run(sampler, sigmas)
    noisy = latent_scale(model, here.run(sampler, sigmas[: at + 1]))
    again = here.run(sampler, sigmas[at:], image=noisy, noise=here.empty(), seed=0)
    # 1 - sigma is small on a flow, and ComfyUI divides the handed over sample by it
    assert relative_error(again, whole) < (1e-5 if model is SD15 else 3e-5)


@BOTH
def test_a_split_with_a_seed_of_its_own(comfy: Comfy, model: TinyModel) -> None:
    """SamplerCustom with add_noise off has the seed; no earlier run is needed to know it."""
    here = bench(comfy, model)
    sampler, sigmas = here.build(recipe_of(model, 1.0))
    whole = here.run(sampler, sigmas)
    noisy = latent_scale(model, here.run(sampler, sigmas[:3]))
    other, _ = here.build(recipe_of(model, 1.0))
    again = here.run(other, sigmas[2:], image=noisy, noise=here.empty(), seed=SEED)
    assert relative_error(again, whole) < 3e-5


@BOTH
@GAMMAS
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.95])
def test_image_to_image(comfy: Comfy, model: TinyModel, gamma: float, strength: float) -> None:
    here = bench(comfy, model)
    recipe = recipe_of(model, gamma)
    image = latents(3, 1, *model.latent_shape)
    sampler, sigmas = here.build(recipe, denoise=strength)
    got = here.run(sampler, sigmas, image=latent_scale(model, image))
    expected = image_to_image(model, recipe, seed=SEED, image=image, strength=strength)
    assert relative_error(got, expected) < CLOSE


def half_mask(here: Bench) -> Tensor:
    mask = torch.ones(1, 1, *here.model.latent_shape[-2:])
    mask[..., 4:] = 0.0
    return mask


@BOTH
@GAMMAS
def test_a_mask_keeps_what_it_covers(comfy: Comfy, model: TinyModel, gamma: float) -> None:
    here = bench(comfy, model)
    image = latents(3, 1, *model.latent_shape)
    recipe = _tcd(recipe_of(model)) if gamma == 0.3 else recipe_of(model, gamma)
    got = here.sample(recipe, image=latent_scale(model, image), mask=half_mask(here))
    assert torch.allclose(got[..., 4:], image[..., 4:], atol=1e-5)
    assert not torch.allclose(got[..., :4], image[..., :4], atol=0.1)


def test_a_mask_as_core_euler_uses_it(comfy: Comfy) -> None:
    import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

    here = bench(comfy, SD3)
    image = latent_scale(SD3, latents(3, 1, *SD3.latent_shape))
    sampler, sigmas = here.build(recipe_of(SD3))
    ours = here.run(sampler, sigmas, image=image, mask=half_mask(here))
    core = here.run(samplers.ksampler("euler"), sigmas, image=image, mask=half_mask(here))
    assert relative_error(ours, core) < 1e-6


@BOTH
@pytest.mark.parametrize("name", ["plain", "starts late", "tcd", "read at clock"])
def test_a_mask_as_the_inpainting_pipeline_uses_it(
    comfy: Comfy, model: TinyModel, name: str
) -> None:
    here = bench(comfy, model)
    recipe = ODD.get(name, lambda same: same)(recipe_of(model))
    image = latents(3, 1, *model.latent_shape)
    got = here.sample(recipe, image=latent_scale(model, image), mask=half_mask(here))
    expected = inpainting(model, recipe, seed=SEED, image=image)
    assert relative_error(got, expected) < CLOSE


def test_every_step_is_told_and_may_stop(comfy: Comfy) -> None:
    class Stopped(Exception):
        pass

    here, told = bench(comfy, SD3), []

    def callback(step: int, x0: Tensor, sample: Tensor, total: int) -> None:
        told.append((step, total, x0.shape == sample.shape))
        if len(told) == 6:
            raise Stopped

    sampler, sigmas = here.build(recipe_of(SD3))
    here.run(sampler, sigmas, callback=callback)
    assert told == [(step, 4, True) for step in range(4)]
    with pytest.raises(Stopped):
        here.run(sampler, sigmas, callback=callback)
    assert len(told) == 6


@BOTH
def test_pictures_of_a_batch_have_their_own_streams(comfy: Comfy, model: TinyModel) -> None:
    from fewstep.comfy_nodes.nodes_ksampler import sample_latent
    from fewstep.comfy_nodes.noise_stream import REPRODUCIBLE

    here = bench(comfy, model)
    recipe = recipe_of(model, 1.0)
    sampler, sigmas = here.build(recipe)
    latent = {"samples": here.empty(2)}
    made = sample_latent(here.guider(), sampler, sigmas, latent, SEED, REPRODUCIBLE).samples
    for index in range(2):
        expected = reference(model, recipe, seed=SEED + index)
        assert relative_error(network_scale(model, made[index : index + 1]), expected) < CLOSE
    latent = {"samples": here.empty(), "batch_index": [1]}
    second = sample_latent(here.guider(), sampler, sigmas, latent, SEED, REPRODUCIBLE).samples
    assert relative_error(second, made[1:]) < CLOSE


@BOTH
def test_comfyuis_own_noise_is_cores(comfy: Comfy, model: TinyModel) -> None:
    import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

    from fewstep.comfy_nodes.nodes_ksampler import sample_latent
    from fewstep.comfy_nodes.noise_stream import COMFYUI

    here = bench(comfy, model)
    sampler, sigmas = here.build(recipe_of(model, 1.0, first_noise="unit"), noise=COMFYUI)
    latent = {"samples": here.empty(2)}
    made = sample_latent(here.guider(), sampler, sigmas, latent, SEED, COMFYUI)
    core = here.run(samplers.ksampler("lcm"), sigmas, image=here.empty(2))
    assert relative_error(network_scale(model, made.samples), core) < CLOSE
    assert relative_error(made.denoised, made.samples) < CLOSE


def test_sigmas_of_another_list_are_refused(comfy: Comfy) -> None:
    here = bench(comfy, SD3)
    sampler, sigmas = here.build(recipe_of(SD3))
    with pytest.raises(ConfigError, match=r"SIGMAS \(1, 0.5, 0\) are not of this sampler, which"):
        here.run(sampler, torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(ConfigError, match="connect the SIGMAS of the same node, whole or split"):
        here.run(sampler, sigmas[:1])


def test_another_base_is_refused(comfy: Comfy) -> None:
    with pytest.raises(AdapterError, match="made for an epsilon or v model .* is a flow model"):
        bench(comfy, SD3).build(recipe_of(SD15))
    with pytest.raises(AdapterError, match="made for a flow model .* is an epsilon or v model"):
        bench(comfy, SD15).build(recipe_of(SD3))
    sampler, sigmas = bench(comfy, SD3).build(recipe_of(SD3))
    with pytest.raises(AdapterError, match="made for a flow model"):
        bench(comfy, SD15).run(sampler, sigmas)


def test_a_model_with_another_table_is_refused(comfy: Comfy) -> None:
    here = bench(comfy, SD15)
    distilled = comfy.nodes()["ModelSamplingDiscrete"]().patch(here.patcher, "lcm", False)[0]
    with pytest.raises(AdapterError, match="remove ModelSampling nodes"):
        Bench(SD15, distilled).build(recipe_of(SD15))
    flow = recipe_of(SD15)
    other = dataclasses.replace(SD_SCHEDULE, beta_end=0.02)
    levels = other.build()
    sigmas = (*(levels.sigma_of_timestep(t) for t in flow.grids[0].timesteps), 0.0)
    base = dataclasses.replace(flow.base, schedule=other)
    grids = (dataclasses.replace(flow.grids[0], sigmas=sigmas),)
    with pytest.raises(AdapterError, match="so it is another base; load a sd15 checkpoint"):
        here.build(dataclasses.replace(flow, base=base, grids=grids))


def test_other_step_counts_are_the_recipes_to_refuse(comfy: Comfy) -> None:
    with pytest.raises(RecipeError, match="not made for 6 steps; use 4"):
        bench(comfy, SD3).build(recipe_of(SD3), steps=6)


def test_a_recipe_beyond_the_nodes_is_refused(comfy: Comfy) -> None:
    policy = StepPolicy(kind="gm", components=8, shift=3.2)
    sampler = Sampler(kind="policy", policy=policy)
    recipe = dataclasses.replace(recipe_of(SD3), sampler=sampler)
    with pytest.raises(RecipeError, match="cannot sample this recipe"):
        bench(comfy, SD3).build(recipe)
