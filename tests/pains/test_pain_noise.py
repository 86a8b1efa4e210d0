"""Pains 12, 13 and 14: seeds that do not repeat, strengths without steps, a forgotten eta."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from fewstep.doctor import examine
from fewstep.pipeline import FewStepPipeline
from tests.pains.common import built, drawn, finding
from tests.tiny_pipelines import FLUX, SD15, stock

OFF = {"guidance_scale": 1.0}


def test_12_flow_pipelines_do_not_hand_their_generator_to_the_step() -> None:
    pipe = built(FLUX, "FlowMatchEulerDiscreteScheduler", stochastic_sampling=True)
    call = {"num_inference_steps": 4}
    assert not torch.equal(drawn(pipe, FLUX, **call), drawn(pipe, FLUX, **call))

    recipe = FLUX.recipe(stochasticity=1.0)
    found = examine(pipe, recipe=recipe, arguments=FLUX.arguments(1))
    finding(found, "noise/seed-ignored")
    assert found.with_fewstep is not None
    assert found.with_fewstep.is_repeatable
    wrapped = FewStepPipeline.wrap(pipe, recipe=recipe)
    assert torch.equal(drawn(wrapped, FLUX), drawn(wrapped, FLUX))


def image_to_image(scheduler: str, **config: Any) -> Any:
    """SD1.5 from an image; its tiny UNet needs no text encoder."""
    parts = built(SD15).components
    pipe: Any = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.scheduler = built(SD15, scheduler, **config).scheduler
    return pipe


def from_black(strength: float) -> dict[str, Any]:
    """A call that starts from latents of zeros, so that all there is in the sample is noise."""
    embeds = SD15.arguments(1)["prompt_embeds"]
    image = torch.zeros(1, 4, 16, 16)
    return {"prompt_embeds": embeds, "image": image, "strength": strength, "output_type": "latent"}


def test_13_four_steps_at_a_low_strength_are_no_steps() -> None:
    pipe = image_to_image("DDIMScheduler", timestep_spacing="trailing")
    call = {**from_black(0.2), **OFF}
    found = examine(pipe, arguments=call, steps=4)
    assert found.as_called is not None
    assert (found.as_called.error, found.as_called.steps) == (None, ())
    assert "strength 0.2" in finding(found, "grid/no-steps").sentence

    under_recipe = examine(pipe, recipe=SD15.recipe(), arguments=call).with_fewstep
    assert under_recipe is not None
    assert len(under_recipe.steps) == 1


def test_13_lcm_with_timesteps_and_strength_adds_noise_to_the_finished_picture() -> None:
    parts = built(SD15).components
    torch.manual_seed(0)
    parts["unet"] = stock.UNet2DConditionModel.from_config(
        parts["unet"].config, time_cond_proj_dim=8
    )
    pipe = stock.LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.scheduler = built(SD15, "LCMScheduler").scheduler
    call = from_black(0.5)
    found = examine(pipe, arguments=call | {"timesteps": [999, 759, 499, 259]})
    left = finding(found, "noise/left-in-result")
    assert left.evidence["leftover"] > 0.3
    assert "adds noise after the last step" in left.sentence

    recipe = SD15.recipe(timesteps=(999.0, 759.0, 499.0, 259.0), stochasticity=1.0)
    same_task = image_to_image("LCMScheduler")
    healthy = examine(same_task, recipe=recipe, arguments={**call, **OFF}).with_fewstep
    assert healthy is not None
    assert healthy.leftover == pytest.approx(0.0, abs=0.05)


def test_14_pipelines_pass_tcd_an_eta_of_zero_unless_told_otherwise() -> None:
    pipe = built(SD15, "TCDScheduler", original_inference_steps=50)
    call = {**OFF, "num_inference_steps": 4}
    assert torch.equal(drawn(pipe, SD15, **call), drawn(pipe, SD15, **call, eta=0.0))
    assert not torch.equal(drawn(pipe, SD15, **call), drawn(pipe, SD15, **call, eta=0.3))

    grid = (999.0, 759.0, 499.0, 259.0)
    recipe = SD15.recipe(timesteps=grid, stochasticity=0.3)
    found = examine(pipe, recipe=recipe, arguments=SD15.arguments(1) | OFF)
    silent = finding(found, "noise/wrong-stochasticity")
    assert "pass eta=0.3" in silent.fix
    assert silent.evidence["kept"] == pytest.approx([1.0, 1.0, 1.0])
    told = examine(pipe, recipe=recipe, arguments=SD15.arguments(1) | OFF | {"eta": 0.3})
    assert "noise/wrong-stochasticity" not in told.codes
    assert found.with_fewstep is not None
    kept = [step.kept for step in found.with_fewstep.steps[:-1]]
    assert kept == pytest.approx(silent.evidence["wanted"], abs=0.1)
