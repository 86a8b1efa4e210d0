"""Guidance in every pipeline's own words, and what is said when a caller says otherwise."""

import functools
import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline, translate_guidance
from fewstep.pipeline.call_arguments import count_images
from fewstep.pipeline.families import check_family, families_of
from fewstep.pipeline.guidance import RULES, call_parameters, rule_of
from fewstep.recipe import Guidance
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLUX,
    QWEN_IMAGE,
    SD3,
    SD15,
    WAN21,
    Z_IMAGE,
    TinyFamily,
    embeds,
    record_denoiser,
)

NONE = Guidance()
CFG = Guidance(mode="cfg", scale=3.0, negative_prompt="works")
EMBEDDED = Guidance(mode="embedded", scale=3.5)
TRUE_CFG = Guidance(mode="true_cfg", scale=2.0, negative_prompt="works")


@functools.cache
def pipeline_classes() -> tuple[type[DiffusionPipeline], ...]:
    """Every pipeline class diffusers has (some need packages that are not installed)."""
    names = [n for n in dir(diffusers) if n.endswith("Pipeline") and n != "DiffusionPipeline"]
    with warnings.catch_warnings():  # importing Kolors uses torch.jit.script, which is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        found = [getattr(diffusers, name) for name in names]
    return tuple(c for c in found if inspect.isclass(c) and issubclass(c, DiffusionPipeline))


@pytest.mark.parametrize(
    ("name", "guidance", "expected"),
    [
        ("StableDiffusionPipeline", NONE, {"guidance_scale": 1.0}),
        ("StableDiffusionPipeline", CFG, {"guidance_scale": 3.0}),
        ("StableDiffusionXLImg2ImgPipeline", NONE, {"guidance_scale": 1.0}),
        ("LatentConsistencyModelPipeline", EMBEDDED, {"guidance_scale": 3.5}),
        ("StableDiffusion3Pipeline", CFG, {"guidance_scale": 3.0}),
        ("FluxPipeline", NONE, {"true_cfg_scale": 1.0, "guidance_scale": 1.0}),
        ("FluxPipeline", EMBEDDED, {"true_cfg_scale": 1.0, "guidance_scale": 3.5}),
        ("FluxPipeline", TRUE_CFG, {"true_cfg_scale": 2.0}),
        ("FluxFillPipeline", EMBEDDED, {"guidance_scale": 3.5}),
        ("Flux2KleinPipeline", NONE, {"guidance_scale": 1.0}),
        ("QwenImagePipeline", NONE, {"true_cfg_scale": 1.0}),
        ("QwenImagePipeline", TRUE_CFG, {"true_cfg_scale": 2.0}),
        ("ZImagePipeline", NONE, {"guidance_scale": 0.0}),
        ("ZImagePipeline", CFG, {"guidance_scale": 2.0}),
        ("Krea2Pipeline", NONE, {"guidance_scale": 0.0}),
        ("PixArtSigmaPipeline", NONE, {"guidance_scale": 1.0}),
        ("SanaPipeline", CFG, {"guidance_scale": 3.0}),
        ("SanaSprintPipeline", EMBEDDED, {"guidance_scale": 3.5}),
        ("WanPipeline", NONE, {"guidance_scale": 1.0}),
        ("WanImageToVideoPipeline", CFG, {"guidance_scale": 3.0}),
        ("LTXPipeline", NONE, {"guidance_scale": 1.0}),
        ("CogVideoXPipeline", NONE, {"guidance_scale": 1.0}),
        ("HunyuanVideoPipeline", EMBEDDED, {"true_cfg_scale": 1.0, "guidance_scale": 3.5}),
        ("HunyuanImagePipeline", EMBEDDED, {"distilled_guidance_scale": 3.5}),
        ("AnimateDiffPipeline", CFG, {"guidance_scale": 3.0}),
        ("HiDreamImagePipeline", NONE, {"guidance_scale": 1.0}),
        ("Lumina2Pipeline", NONE, {"guidance_scale": 1.0}),
        ("ChromaPipeline", NONE, {"guidance_scale": 1.0}),
        ("ErnieImagePipeline", NONE, {"guidance_scale": 1.0}),
    ],
)
def test_guidance_is_translated(name: str, guidance: Guidance, expected: dict[str, float]) -> None:
    assert translate_guidance(getattr(diffusers, name), guidance) == expected


def test_every_class_of_the_table_takes_the_arguments_it_is_given() -> None:
    checked = 0
    for pipeline_class in pipeline_classes():
        parameters = call_parameters(pipeline_class)
        _, is_known = rule_of(pipeline_class.__name__, parameters)
        rule = rule_of(pipeline_class.__name__, parameters)[0]
        if is_known and rule.cfg in parameters:
            assert translate_guidance(pipeline_class, NONE), pipeline_class.__name__
            checked += 1
    assert checked > 80


def test_every_row_of_the_table_is_about_a_real_class() -> None:
    names = dir(diffusers)  # with the classes whose optional dependency (sentencepiece) is missing
    for prefix in RULES:
        assert any(name.startswith(prefix) for name in names), prefix


def test_guidance_a_class_cannot_do_is_an_error() -> None:
    with pytest.raises(PipelineError, match="guidance is 'embedded', but WanPipeline has no"):
        translate_guidance(diffusers.WanPipeline, EMBEDDED)


def test_an_embedded_scale_needs_a_unet_that_takes_it() -> None:
    with pytest.raises(PipelineError, match="time_cond_proj_dim"):
        FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe(guidance=EMBEDDED))


def test_an_unknown_class_is_guessed_from_its_signature_and_said() -> None:
    class NewModelPipeline(diffusers.StableDiffusion3Pipeline):
        pass

    stock = SD3.build()
    with pytest.warns(UserWarning, match="NewModelPipeline is not in fewstep's guidance table"):
        pipe = FewStepPipeline.wrap(NewModelPipeline(**stock.components), recipe=SD3.recipe())
    calls = record_denoiser(pipe, SD3)
    pipe(**SD3.arguments(1), seed=0)
    assert len(calls) == 4
    assert "(guessed from the signature)" in pipe.describe()


@pytest.mark.parametrize("family", [SD15, SD3, WAN21, Z_IMAGE], ids=lambda f: f.name)
def test_cfg_runs_an_unconditional_pass_of_the_recipes_scale(family: TinyFamily) -> None:
    pipe = FewStepPipeline.wrap(family.build(), recipe=family.recipe(guidance=CFG))
    calls = record_denoiser(pipe, family)
    arguments = family.arguments(1)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        if name in arguments:
            arguments[f"negative_{name}"] = arguments[name]
    pipe(**arguments, seed=0)
    assert sum(len(sample) for _, _, sample in calls) == 8
    assert pipe.recipe.nfe() == 8


def test_true_cfg_asks_for_the_negative_embeddings_it_needs() -> None:
    pipe = FewStepPipeline.wrap(QWEN_IMAGE.build(), recipe=QWEN_IMAGE.recipe(guidance=TRUE_CFG))
    with pytest.raises(PipelineError, match="pass negative_prompt_embeds beside prompt_embeds"):
        pipe(**QWEN_IMAGE.arguments(1), seed=0)
    calls = record_denoiser(pipe, QWEN_IMAGE)
    negative: dict[str, Any] = {
        "negative_prompt_embeds": embeds(1, 6, 16),
        "negative_prompt_embeds_mask": torch.ones(1, 6).long(),
    }
    pipe(**QWEN_IMAGE.arguments(1), **negative, seed=0)
    assert len(calls) == 8


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_any_way_of_saying_off_is_taken_silently(value: float) -> None:
    """Also asserts that it stays off: one pass of an un-doubled batch per step."""
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    calls = record_denoiser(pipe, SD3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(**SD3.arguments(1), guidance_scale=value, seed=0)
    assert [len(sample) for _, _, sample in calls] == [1] * 4


def test_a_caller_who_guides_a_model_that_must_not_be_is_warned_and_obeyed() -> None:
    pipe = FewStepPipeline.wrap(Z_IMAGE.build(), recipe=Z_IMAGE.recipe())
    calls = record_denoiser(pipe, Z_IMAGE)
    negative = list(embeds(1, 6, 16))
    with pytest.warns(UserWarning, match="guidance_scale=1 is used as passed") as caught:
        pipe(**Z_IMAGE.arguments(1), guidance_scale=1.0, negative_prompt_embeds=negative, seed=0)
    assert caught[0].filename == __file__
    assert [len(sample) for _, _, sample in calls] == [2] * 4


def test_a_negative_prompt_without_guidance_is_said_to_be_inert_once() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    arguments = {**SD15.arguments(1), "negative_prompt": "blurry", "seed": 0}
    plain = pipe(**SD15.arguments(1), seed=0)[0]
    with pytest.warns(UserWarning, match="the negative prompt has no effect") as caught:
        picture = pipe(**arguments)[0]
    assert caught[0].filename == __file__
    assert torch.equal(picture, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(**arguments)


@pytest.mark.parametrize("empty", [None, "", " ", [""]])
def test_an_empty_negative_prompt_is_not_worth_a_warning(empty: object) -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(**SD15.arguments(1), negative_prompt=empty, seed=0)


def test_eta_has_no_effect_and_that_is_said() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    plain = pipe(**SD15.arguments(1), seed=0)[0]
    with pytest.warns(UserWarning, match="eta=0.3 has no effect"):
        assert torch.equal(pipe(**SD15.arguments(1), eta=0.3, seed=0)[0], plain)


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_a_recipe_of_another_family_is_refused(family: TinyFamily) -> None:
    other = "flux" if family is not FLUX else "wan"
    with pytest.raises(PipelineError, match=f"this recipe is for {other}, but .*Pipeline samples"):
        check_family(type(family.build()).__name__, other)
    check_family(type(family.build()).__name__, family.family)


def test_families_are_told_by_the_longest_name() -> None:
    assert families_of("StableDiffusionXLInpaintPipeline") == ("sdxl",)
    assert families_of("StableDiffusion3Pipeline") == ("sd3",)
    assert families_of("SomethingNewPipeline") == ()
    check_family("QwenImagePipeline", "qwen_image")  # either spelling


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompt": "one"}, 1),
        ({"prompt": ["one", "two"], "num_images_per_prompt": 3}, 6),
        ({"prompt_embeds": torch.zeros(2, 3, 4)}, 2),
        ({"prompt_embeds": [torch.zeros(3, 4)] * 3}, 3),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 3), "num_videos_per_prompt": 2}, 4),
        ({}, 1),
    ],
)
def test_images_of_a_call_are_counted(arguments: dict[str, object], expected: int) -> None:
    assert count_images(arguments) == expected
