"""The recipe nodes in a real ComfyUI."""

from pathlib import Path
from typing import Any

import pytest

from fewstep.adapters import read_header
from fewstep.comfy_nodes.presets import CHOICES, find_preset
from tests.comfy.graph import Graph
from tests.comfy.harness import Comfy, GraphFailed
from tests.comfy.tiny_models import SD3, SD15, TinyModel
from tests.comfy_pack.lora_files import kohya_lora

DMD2 = "SDXL · dmd2-sdxl-4step-lora"


@pytest.fixture
def lora(comfy: Comfy) -> Path:
    """A LoRA without a recipe, in ComfyUI's folder."""
    folder = comfy.folder / "loras"
    for old in folder.glob("recipe_nodes*"):
        old.unlink()
    return kohya_lora(folder / "recipe_nodes.safetensors")


def recipe(comfy: Comfy, **widgets: Any) -> Any:
    """What the recipe node gives, and the text it shows as `.shown`."""
    graph = Graph()
    graph.capture(graph.add("FewStepRecipe", **widgets), "recipe")
    return comfy.run(graph.prompt)["recipe"]


def shown(comfy: Comfy, graph: Graph, class_type: str, **inputs: Any) -> str:
    """The text an output node shows."""
    node = graph.add(class_type, **inputs)
    comfy.run(graph.prompt)
    (text,) = comfy.ui[node.id]["text"]
    return text


def test_a_preset_is_the_zoos_recipe(comfy: Comfy) -> None:
    named = recipe(comfy, preset=DMD2)
    assert named.recipe == find_preset(DMD2).recipe
    assert named.name == "DMD2 SDXL LoRA, 4 steps"


def test_the_node_says_what_it_will_do_and_who_says_so(comfy: Comfy) -> None:
    graph = Graph()
    node = graph.add("FewStepRecipe", preset=DMD2)
    graph.capture(node, "recipe")
    comfy.run(graph.prompt)
    (text,) = comfy.ui[node.id]["text"]
    assert text.startswith("DMD2 · 4 steps · re-noise · guidance 1.0 · base SDXL\n")
    assert "https://huggingface.co/tianweiy/DMD2" in text


def test_a_choice_of_another_release_still_works(comfy: Comfy) -> None:
    assert recipe(comfy, preset="dmd2-sdxl-4step-lora").recipe == find_preset(DMD2).recipe


def test_an_unknown_preset_is_refused_before_anything_runs(comfy: Comfy) -> None:
    with pytest.raises(GraphFailed, match="did you mean dmd2-sdxl-4step-lora") as failed:
        recipe(comfy, preset="SDXL · dmd2-sdxl-4steps-lora")
    assert failed.value.kind == "custom_validation_failed"
    with pytest.raises(GraphFailed, match="is no preset: its numbers are written from memory"):
        recipe(comfy, preset="sd-turbo")


def test_other_widgets_are_still_checked(comfy: Comfy) -> None:
    with pytest.raises(GraphFailed) as failed:
        recipe(comfy, preset=DMD2, stochasticity=2.0)
    assert failed.value.kind == "value_bigger_than_max"
    with pytest.raises(GraphFailed) as failed:
        recipe(comfy, preset="custom", family="unheard", steps=4)
    assert failed.value.kind == "value_not_in_list"


def test_widgets_change_a_preset(comfy: Comfy) -> None:
    named = recipe(comfy, preset=DMD2, timesteps="999, 499", guidance=2.0)
    assert named.recipe.grid().timesteps == (999.0, 499.0)
    assert named.recipe.guidance.scale == 2.0
    assert named.recipe.sampler == find_preset(DMD2).recipe.sampler
    assert named.name == "DMD2 SDXL LoRA, 4 steps (changed: timesteps, guidance)"


def test_a_recipe_can_be_written(comfy: Comfy) -> None:
    named = recipe(comfy, preset="custom", family="wan", steps=4, shift=5.0)
    assert named.recipe.grid().sigmas[1] == 0.9375
    with pytest.raises(GraphFailed, match="A custom recipe needs its steps"):
        recipe(comfy, preset="custom")


def test_every_choice_of_the_list_runs(comfy: Comfy) -> None:
    graph = Graph()
    for choice in CHOICES[1:]:
        graph.capture(graph.add("FewStepRecipe", preset=choice), choice)
    caught = comfy.run(graph.prompt)
    assert {named.name for named in caught.values()} == {
        find_preset(choice).title for choice in CHOICES[1:]
    }


def test_the_info_node_reads_a_file(comfy: Comfy, lora: Path) -> None:
    text = shown(comfy, Graph(), "FewStepRecipeInfo", lora_name=lora.name)
    assert "has no few-step recipe" in text
    assert "rank      2, alpha 4, scale 2: 2 modules" in text


def test_the_info_node_reads_a_recipe(comfy: Comfy) -> None:
    graph = Graph()
    preset = graph.add("FewStepRecipe", preset=DMD2)
    info = graph.add("FewStepRecipeInfo", recipe=preset)
    graph.capture(info, "text")
    text = comfy.run(graph.prompt)["text"]
    assert list(comfy.ui[info.id]["text"]) == [text]
    assert "timesteps 999, 749, 499, 249" in text
    assert "licence   cc-by-nc-sa-4.0" in text


@pytest.mark.parametrize(
    ("model", "widgets", "told"),
    [
        (SD15, {"family": "sd15", "timesteps": "999, 499"}, "in MODEL  14.6146, 1.61289, 0\n"),
        (SD3, {"family": "sd3", "timesteps": "1000, 500"}, "in MODEL  1, 0.5, 0\n"),
        (SD3, {"family": "sdxl", "timesteps": "999, 499"}, "but MODEL is SD3 (flow)"),
    ],
    ids=["sd15", "sd3", "another base"],
)
def test_the_info_node_tells_the_sigmas_of_a_model(
    comfy: Comfy, model: TinyModel, widgets: dict[str, Any], told: str
) -> None:
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default")
    preset = graph.add("FewStepRecipe", preset="custom", **widgets)
    assert told in shown(comfy, graph, "FewStepRecipeInfo", recipe=preset, model=loaded)


def test_the_info_node_with_nothing_says_what_to_connect(comfy: Comfy) -> None:
    with pytest.raises(GraphFailed, match="choose a LoRA, or connect a recipe"):
        shown(comfy, Graph(), "FewStepRecipeInfo")


def test_the_attaching_node_saves_a_copy_that_the_loader_knows(comfy: Comfy, lora: Path) -> None:
    graph = Graph()
    preset = graph.add("FewStepRecipe", preset=DMD2)
    graph.capture(graph.add("FewStepAttachRecipe", lora_name=lora.name, recipe=preset), "name")
    name = comfy.run(graph.prompt)["name"]
    assert name == "recipe_nodes-few-step.safetensors"
    assert read_header(lora.with_name(name)).recipe() == find_preset(DMD2).recipe
    assert read_header(lora).recipe() is None
    text = shown(comfy, Graph(), "FewStepRecipeInfo", lora_name=name)
    assert text.startswith("DMD2 · 4 steps · re-noise")


def test_the_attaching_node_overwrites_nothing_unasked(comfy: Comfy, lora: Path) -> None:
    def attach(choice: str, **widgets: Any) -> str:
        graph = Graph()
        preset = graph.add("FewStepRecipe", preset=choice)
        given = {"lora_name": lora.name, "recipe": preset, "file_name": "recipe_nodes-x"}
        return shown(comfy, graph, "FewStepAttachRecipe", **given, **widgets)

    assert "saved in the loras folder" in attach(DMD2)
    assert "is there already, with this recipe" in attach(DMD2)
    with pytest.raises(GraphFailed, match="is there already, with other content"):
        attach("SDXL · lcm-lora-sdxl")
    assert "saved" in attach("SDXL · lcm-lora-sdxl", overwrite=True)


@pytest.mark.parametrize("name", ["../x", "a/b", "recipe_nodes.safetensors"])
def test_the_attaching_node_keeps_to_its_folder(comfy: Comfy, lora: Path, name: str) -> None:
    before = lora.read_bytes()
    graph = Graph()
    given = {"lora_name": lora.name, "recipe": graph.add("FewStepRecipe", preset=DMD2)}
    with pytest.raises(GraphFailed, match="not a plain file name|would overwrite"):
        shown(comfy, graph, "FewStepAttachRecipe", **given, file_name=name, overwrite=True)
    assert lora.read_bytes() == before


def test_a_recipe_for_another_family_is_not_attached(comfy: Comfy, lora: Path) -> None:
    graph = Graph()
    given = {"lora_name": lora.name, "recipe": graph.add("FewStepRecipe", preset="flux1-schnell")}
    with pytest.raises(GraphFailed, match="look like sdxl, but the recipe is for flux"):
        shown(comfy, graph, "FewStepAttachRecipe", **given)


def test_every_socket_has_a_tooltip(comfy: Comfy) -> None:
    for name in ("FewStepRecipe", "FewStepRecipeInfo", "FewStepAttachRecipe"):
        node = comfy.nodes()[name]
        schema = node.GET_SCHEMA()
        assert schema.description
        assert all(one.tooltip for one in (*schema.inputs, *schema.outputs)), name
