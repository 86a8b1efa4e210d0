"""Our pack in a ComfyUI server: installed as users install it, spoken to as the front end does."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.recipe import FewStepRecipe
from tests.comfy.adapter_files import adapter_file
from tests.comfy.graph import Graph
from tests.comfy.harness import GraphFailed
from tests.comfy.parity import empty_latent, prompt
from tests.comfy.server import Server
from tests.comfy.tiny_models import SD3, TinyModel
from tests.comfy.tiny_vae import save_random_vae

OURS = (
    "FewStepAttachRecipe",
    "FewStepEngineLoader",
    "FewStepGuider",
    "FewStepKSampler",
    "FewStepLoraLoader",
    "FewStepRecipe",
    "FewStepRecipeInfo",
    "FewStepSampling",
    "FewStepSigmas",
    "SamplerFewStep",
)
LONG = 1000
"""Steps of the graph that is interrupted."""


def quickstart(server: Server, *, model: TinyModel = SD3, lora: str, seed: int = 1) -> Graph:
    """Loader, adapter, sampler, picture: what most people build."""
    vae = save_random_vae(server.folder)
    graph = Graph()
    base = graph.add("UNETLoader", unet_name=model.save(server.folder), weight_dtype="default")
    adapted = graph.add(
        "FewStepLoraLoader",
        model=base,
        lora_name=lora,
        strength=1.0,
        unmatched_keys="error",
        base_check="error",
    )
    sampled = graph.add(
        "FewStepKSampler",
        model=adapted,
        positive=prompt(graph, model),
        latent_image=empty_latent(graph, model),
        seed=seed,
        denoise=1.0,
        steps=0,
        noise="reproducible (CPU)",
    )
    pixels = graph.add("VAEDecode", samples=sampled, vae=graph.add("VAELoader", vae_name=vae))
    graph.add("SaveImage", images=pixels, filename_prefix="quickstart")
    return graph


def saved_lora(server: Server, name: str, recipe: FewStepRecipe | None) -> str:
    """An adapter file for the tiny SD3 in the server's folder."""
    return adapter_file(server.folder / "loras" / f"{name}.safetensors", SD3, recipe).name


def inputs_of(prompt: dict[str, Any]) -> dict[str, Any]:
    """A graph without what ComfyUI notes in it while it runs."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


def only_picture(server: Server, outputs: dict[str, Any]) -> bytes:
    """The one picture that a graph saved."""
    (entry,) = [picture for one in outputs.values() for picture in one.get("images", ())]
    return server.picture(entry)


def test_the_pack_loads(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8")
    assert "IMPORT FAILED" not in log, server.tail()
    assert "fewstep-nodes" in log  # in the list of import times


def test_every_node_and_socket_is_explained(server: Server) -> None:
    nodes = server.get("/object_info")
    assert set(OURS) <= set(nodes)
    for name in OURS:
        node = nodes[name]
        assert node["description"], name
        assert node["category"].split("/")[0] == "few-step", name
        for kind in ("required", "optional"):
            for socket, told in node["input"].get(kind, {}).items():
                assert told[1].get("tooltip"), f"{name}.{socket}"
        assert len(node["output_tooltips"]) == len(node["output"]), name
        assert all(node["output_tooltips"]), name


def test_the_pack_runs_on_the_fewstep_it_carries(server: Server) -> None:
    graph = Graph()
    shown = graph.add("PreviewAny", source=graph.add("FewStepTestOrigin"))
    (text,) = server.run(graph.prompt)[shown.id]["text"]
    carried = server.folder / "custom_nodes" / "fewstep-nodes" / "carried"
    assert carried.resolve() in Path(text).resolve().parents


def test_a_picture_arrives_and_carries_its_graph(server: Server) -> None:
    lora = saved_lora(server, "quickstart", SD3.recipe("sd3"))
    graph = quickstart(server, lora=lora).prompt
    workflow = {"nodes": [{"id": 3, "type": "FewStepKSampler", "widgets_values": [1, 1.0]}]}
    outputs = server.wait(server.start(graph, workflow))
    picture = Image.open(io.BytesIO(only_picture(server, outputs)))
    assert picture.size == (64, 64)
    assert inputs_of(json.loads(picture.info["prompt"])) == inputs_of(graph)
    assert json.loads(picture.info["workflow"]) == workflow


def test_a_saved_graph_draws_the_same_picture_again(server: Server) -> None:
    lora = saved_lora(server, "again", SD3.recipe("sd3", stochasticity=1.0))
    graph = quickstart(server, lora=lora, seed=7).prompt
    first = only_picture(server, server.run(graph))
    server.post("/free", {"unload_models": True, "free_memory": True})  # forgets cached results
    loaded = json.loads(Image.open(io.BytesIO(first)).info["prompt"])
    second = only_picture(server, server.run(loaded))
    assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(second)).tobytes()


def test_messages_arrive_as_we_wrote_them(server: Server) -> None:
    lora = saved_lora(server, "plain", None)
    with pytest.raises(GraphFailed) as failed:
        server.run(quickstart(server, lora=lora).prompt)
    assert failed.value.message.startswith("'plain.safetensors' has no few-step recipe. ")
    assert failed.value.message.endswith('"Few-Step Recipe" node (a preset may exist).')


def test_a_wrong_connection_is_refused_before_anything_runs(server: Server) -> None:
    graph = quickstart(server, lora=saved_lora(server, "wrong", SD3.recipe("sd3")))
    sampler = next(n for n in graph.prompt.values() if n["class_type"] == "FewStepKSampler")
    sampler["inputs"]["recipe"] = sampler["inputs"]["positive"]
    with pytest.raises(GraphFailed, match="FEWSTEP_RECIPE"):
        server.start(graph.prompt)


def test_cancel_stops_between_two_steps(server: Server) -> None:
    lora = saved_lora(server, "long", SD3.recipe("sd3", steps="any"))
    graph = quickstart(server, lora=lora).prompt
    sampler = next(n for n in graph.values() if n["class_type"] == "FewStepKSampler")
    sampler["inputs"]["steps"] = LONG
    started = server.start(graph)
    _until_running(server, started)
    server.post("/interrupt", {})
    with pytest.raises(GraphFailed) as failed:
        server.wait(started)
    assert failed.value.kind == "interrupted"


def _until_running(server: Server, prompt_id: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any(entry[1] == prompt_id for entry in server.get("/queue")["queue_running"]):
            break
        time.sleep(0.05)
    time.sleep(1.0)  # into the sampling
