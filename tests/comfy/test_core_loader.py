"""A few-step adapter loaded by ComfyUI's own node: right, or refused; never nearly right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.recipe import FewStepRecipe, Lora
from tests.comfy.adapter_files import adapter_file
from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy, GraphFailed
from tests.comfy.references import reference, relative_error
from tests.comfy.test_lora import PARITY, SEED, base, drawn
from tests.comfy.tiny_models import SD3, SDXL, TinyModel


@pytest.fixture(scope="module", autouse=True)
def attaching(comfy: Comfy) -> None:
    """Skip where the core attaches nothing, as 0.8.0 does not."""
    import inspect

    import comfy.sd as sd  # pyright: ignore[reportMissingImports]

    assert comfy
    if "lora_metadata" not in inspect.signature(sd.load_lora_for_models).parameters:
        pytest.skip("this ComfyUI's own loader does not attach a file's metadata")


def by_core(
    comfy: Comfy, model: TinyModel, name: str, recipe: FewStepRecipe | None = None, **more: Any
) -> tuple[Graph, Node, Path]:
    """A graph with the adapter in ComfyUI's own node."""
    folder = comfy.folder / "loras"
    file = adapter_file(
        folder / f"core-{name}.safetensors", model, recipe or model.recipe(model.family), **more
    )
    graph = Graph()
    loaded = graph.add(
        "LoraLoaderModelOnly",
        model=base(graph, comfy, model),
        lora_name=file.name,
        strength_model=1.0,
    )
    return graph, loaded, file


@pytest.mark.parametrize("model", [SD3, SDXL], ids=lambda model: model.name)
def test_a_file_with_its_alphas_in_tensors_draws_the_pipelines_picture(
    comfy: Comfy, model: TinyModel
) -> None:
    graph, loaded, file = by_core(comfy, model, model.name, spelling="comfyui")
    latents = drawn(graph, comfy, model, loaded)
    expected = reference(model, model.recipe(model.family), seed=SEED, adapter=file)
    assert relative_error(latents, expected) < PARITY


@pytest.mark.parametrize(
    ("spelling", "scale", "reason"),
    [
        ("diffusers", 1.0, "does not know the alphas in its metadata"),
        ("comfyui", 0.25, "does not know that its recipe scales it by 0.25"),
    ],
)
def test_what_the_core_cannot_apply_is_refused(
    comfy: Comfy, spelling: str, scale: float, reason: str
) -> None:
    recipe = replace(SD3.recipe("sd3"), lora=Lora(scale=scale))
    graph, loaded, _ = by_core(comfy, SD3, f"{spelling}-{scale}", recipe, spelling=spelling)
    with pytest.raises(GraphFailed, match=rf"{reason}.*; load it with \"Few-Step LoRA Loader\""):
        drawn(graph, comfy, SD3, loaded)


def test_an_adapter_that_changed_nothing_is_refused(comfy: Comfy) -> None:
    graph, loaded, file = by_core(comfy, SDXL, "sdxl-again", spelling="comfyui")
    adapter_file(file, SD3, SD3.recipe("sd3"), spelling="comfyui")  # of another network
    with pytest.raises(GraphFailed, match="found no weight of it in MODEL"):
        drawn(graph, comfy, SDXL, loaded)
