"""A recipe's guidance in ComfyUI's terms."""

from dataclasses import replace

import pytest

from fewstep.comfy_nodes.guidance_choice import choose_guidance
from fewstep.errors import PipelineError
from fewstep.recipe import Guidance
from tests.tiny.recipes import flow_recipe

PLAIN = flow_recipe("flux")
GUIDED = replace(PLAIN, guidance=Guidance(mode="cfg", scale=2.0))
TOLD = replace(PLAIN, guidance=Guidance(mode="embedded", scale=3.5))


def test_no_guidance_needs_no_negative_prompt() -> None:
    choice = choose_guidance(PLAIN, None, has_negative=False)
    assert (choice.cfg, choice.embedded, choice.warning) == (1.0, None, "")


def test_guidance_needs_a_negative_prompt() -> None:
    assert choose_guidance(GUIDED, None, has_negative=True).cfg == 2.0
    with pytest.raises(PipelineError) as error:
        choose_guidance(GUIDED, None, has_negative=False)
    assert str(error.value) == (
        "Guidance is 2.0 in this recipe: connect a negative prompt, or set guidance to 1.0."
    )
    assert choose_guidance(GUIDED, 1.0, has_negative=False).cfg == 1.0


def test_embedded_guidance_is_told_and_runs_the_network_once() -> None:
    choice = choose_guidance(TOLD, None, has_negative=False)
    assert (choice.cfg, choice.embedded, choice.warning) == (1.0, 3.5, "")
    assert choose_guidance(TOLD, 2.0, has_negative=False).embedded == 2.0


def test_guidance_beside_the_recipe_is_told() -> None:
    choice = choose_guidance(PLAIN, 4.0, has_negative=True)
    assert choice.cfg == 4.0
    assert choice.warning == (
        "guidance 4.0 on a recipe trained for 1.0: expect burnt colours and half the speed."
    )
