"""Pain 7: "no guidance" is said differently by every pipeline, and some words do nothing."""

from typing import Any

import pytest
import torch

from fewstep.doctor import examine
from fewstep.doctor.finding import Diagnosis
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Guidance
from tests.pains.common import built, drawn, finding
from tests.tiny_pipelines import FLUX, QWEN_IMAGE, SDXL, Z_IMAGE, TinyFamily, embeds

# diffusers' Euler turns tensors into arrays the way numpy 1 liked.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SDXL_NEGATIVE = {
    "negative_prompt_embeds": -embeds(1, 6, 64),
    "negative_pooled_prompt_embeds": -embeds(1, 32),
}
STEPS = {"num_inference_steps": 4}


def passes(family: TinyFamily, pipe: Any, recipe: Any = None, **call: Any) -> Diagnosis:
    return examine(pipe, recipe=recipe, steps=4, arguments={**family.arguments(1), **call})


def test_7_the_default_call_guides_a_model_that_was_made_for_none() -> None:
    pipe = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="trailing")
    found = passes(SDXL, pipe, SDXL.recipe(), **SDXL_NEGATIVE)
    assert found.as_called is not None
    assert found.as_called.nfe == 8
    assert "guidance_scale is 5, the class's default" in finding(found, "guidance/not-off").sentence
    assert found.with_fewstep is not None
    assert found.with_fewstep.nfe == 4


def test_7_one_is_not_off_where_the_formula_adds_instead_of_mixing() -> None:
    pipe = built(Z_IMAGE, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    negative = {"negative_prompt_embeds": [-one for one in embeds(1, 6, 16)]}
    plain = drawn(pipe, Z_IMAGE, guidance_scale=0.0, **STEPS)
    one = drawn(pipe, Z_IMAGE, guidance_scale=1.0, **STEPS, **negative)
    assert not torch.allclose(plain, one, atol=1e-3)

    found = passes(Z_IMAGE, pipe, guidance_scale=1.0, **negative)
    assert found.as_called is not None
    assert found.as_called.passes == 2.0
    assert "pass guidance_scale=0" in finding(found, "guidance/one-is-not-off").fix
    ours = passes(Z_IMAGE, pipe, Z_IMAGE.recipe(), guidance_scale=1.0, **negative).with_fewstep
    assert ours is not None
    assert ours.passes == 1.0


def test_7_a_negative_prompt_without_a_second_pass_changes_nothing() -> None:
    pipe = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="trailing")
    call = {"guidance_scale": 1.0, **STEPS}
    assert torch.equal(drawn(pipe, SDXL, **call), drawn(pipe, SDXL, **call, **SDXL_NEGATIVE))

    found = passes(SDXL, pipe, guidance_scale=1.0, **SDXL_NEGATIVE)
    finding(found, "guidance/negative-has-no-effect")
    wrapped = FewStepPipeline.wrap(pipe, recipe=SDXL.recipe())
    with pytest.warns(UserWarning, match="the negative prompt has no effect"):
        drawn(wrapped, SDXL, **SDXL_NEGATIVE)


def test_7_true_guidance_is_silent_without_a_negative_prompt() -> None:
    pipe = built(QWEN_IMAGE, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    plain = drawn(pipe, QWEN_IMAGE, true_cfg_scale=1.0, **STEPS)
    assert torch.equal(plain, drawn(pipe, QWEN_IMAGE, true_cfg_scale=4.0, **STEPS))

    recipe = QWEN_IMAGE.recipe(guidance=Guidance(mode="true_cfg", scale=4.0))
    found = passes(QWEN_IMAGE, pipe, recipe, true_cfg_scale=4.0)
    assert "beside a negative prompt" in finding(found, "guidance/not-on").sentence
    assert "negative_prompt_embeds" in str(found.with_fewstep and found.with_fewstep.error)


def test_7_the_embedded_scale_is_no_switch() -> None:
    pipe = built(FLUX, "FlowMatchEulerDiscreteScheduler")
    found = passes(FLUX, pipe, FLUX.recipe())
    assert found.as_called is not None
    assert found.as_called.passes == 1.0  # guidance_scale 3.5 is a network input, not a pass
    assert finding(found, "guidance/other-scale").evidence["wanted"] == 1.0
