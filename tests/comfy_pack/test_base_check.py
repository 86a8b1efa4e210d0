"""Which base a MODEL is, told by class names, and what is said where it is another."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.comfy_nodes.base_check import base_problem, family_of, prediction_of
from fewstep.recipe import FewStepRecipe
from tests.comfy_pack import stand_ins
from tests.tiny.recipes import flow_recipe, vp_recipe


def model(kind: str, sampling: type[Any] = stand_ins.TableSampling, **unet_config: Any) -> Any:
    """A MODEL of a class of this name."""
    network = type(kind, (stand_ins.BaseModel,), {})(**unet_config)
    return SimpleNamespace(model=network, get_model_object=lambda name: sampling())


@pytest.mark.parametrize(
    ("kind", "config", "family"),
    [
        ("BaseModel", {"context_dim": 768}, "sd15"),
        ("BaseModel", {"context_dim": 1024}, "sd2"),
        ("SDXL", {}, "sdxl"),
        ("SD3", {}, "sd3"),
        ("Flux2", {}, "flux2"),
        ("Lumina2", {"z_image_modulation": True}, "z-image"),
        ("Lumina2", {}, "lumina2"),
        ("WAN21_Vace", {}, "wan"),
        ("SomebodysOwnModel", {}, None),
    ],
)
def test_the_family_is_told_by_the_class(
    kind: str, config: dict[str, Any], family: str | None
) -> None:
    assert family_of(model(kind, **config)) == family


@pytest.mark.parametrize(
    ("sampling", "prediction"),
    [
        (stand_ins.FlowSampling, "flow"),
        (stand_ins.TableSampling, "epsilon"),
        (stand_ins.VTableSampling, "v"),
        (stand_ins.EdmSampling, None),
    ],
)
def test_the_prediction_is_told_by_the_sampling(
    sampling: type[Any], prediction: str | None
) -> None:
    assert prediction_of(model("SDXL", sampling)) == prediction


def test_another_family_is_a_problem() -> None:
    problem = base_problem(vp_recipe("sdxl"), model("Flux", stand_ins.FlowSampling))
    assert problem == (
        "This adapter was trained for SDXL (epsilon), but MODEL is Flux (flow). Load an SDXL "
        'checkpoint, or set base_check to "warn".'
    )


def test_another_prediction_of_the_same_family_names_the_node_that_changes_it() -> None:
    problem = base_problem(
        vp_recipe("sd15"), model("BaseModel", stand_ins.VTableSampling, context_dim=768)
    )
    assert problem is not None
    assert 'Put "ModelSamplingDiscrete" with "eps" before this node' in problem


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(vp_recipe("sdxl"), "SDXL"), (vp_recipe("sd15"), "SomebodysOwnModel")],
)
def test_what_fits_or_is_unknown_is_no_problem(recipe: FewStepRecipe, kind: str) -> None:
    assert base_problem(recipe, model(kind)) is None


def test_spellings_of_a_family_are_alike() -> None:
    recipe = flow_recipe("qwen-image")
    recipe = replace(recipe, base=replace(recipe.base, family="Qwen_Image"))
    assert base_problem(recipe, model("QwenImage", stand_ins.FlowSampling)) is None
