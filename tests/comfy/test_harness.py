"""The harness itself, on ComfyUI's own nodes."""

import pytest

from tests.comfy.graph import Graph
from tests.comfy.harness import Comfy, GraphFailed
from tests.comfy.tiny_models import ALL_MODELS, TinyModel

KINDS = {
    "sd3": "SD3",
    "sd15": "SD15",
    "sdxl": "Segmind_Vega",
    "wan": "WAN21_T2V",
    "pixart": "PixArtSigma",
}
"""What ComfyUI calls each model."""


def test_it_runs_core_nodes_and_gives_values_back(comfy: Comfy) -> None:
    graph = Graph()
    made = graph.add("FewStepTestConditioning", seed=1, tokens=3, width=8, pooled=4)
    graph.capture(made, "prompt")
    graph.capture(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1), "latent")
    caught = comfy.run(graph.prompt)
    (cond, extra), *_ = caught["prompt"]
    assert cond.shape == (1, 3, 8)
    assert extra["pooled_output"].shape == (1, 4)
    assert caught["latent"]["samples"].shape == (1, 16, 8, 8)


def test_it_says_which_node_failed(comfy: Comfy) -> None:
    graph = Graph()
    bad = graph.add("FewStepTestLatent", seed=1, shape="a,b")
    graph.capture(bad, "latent")
    with pytest.raises(GraphFailed, match="invalid literal") as failed:
        comfy.run(graph.prompt)
    assert failed.value.node_id == bad.id


def test_it_says_what_was_refused(comfy: Comfy) -> None:
    graph = Graph()
    node = graph.add("UNETLoader", unet_name="none.safetensors", weight_dtype="default")
    graph.capture(node, "model")
    with pytest.raises(GraphFailed, match="none.safetensors") as failed:
        comfy.run(graph.prompt)
    assert failed.value.node_id == node.id


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: model.name)
def test_comfyui_takes_the_tiny_models_for_the_real_ones(comfy: Comfy, model: TinyModel) -> None:
    graph = Graph()
    graph.capture(
        graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default"), "model"
    )
    loaded = comfy.run(graph.prompt)["model"].model
    assert KINDS[model.name] == type(loaded.model_config).__name__
    assert not [name for name, value in loaded.named_parameters() if value.isnan().any()]
