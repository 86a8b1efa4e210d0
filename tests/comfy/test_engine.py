"""Few-Step Engine Loader: an exported model in ComfyUI draws what FewStepRuntime draws.

Oracle: FewStepRuntime on the same folder. Pixels may differ by one grey level.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.recipe import SIDECAR_NAME, FewStepRecipe, Guidance, Sampler
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy, GraphFailed
from tests.export.tiny_exports import BY_NAME, exported

PROMPT, NEGATIVE = "a red cat", "two big blue dogs run"
ROWS, COLUMNS = 8, 12
"""Latents of the pictures; every family's network takes them."""
STOCK_FACTOR = 8
"""Pixels per latent of ComfyUI's empty latents, whatever the autoencoder."""
SEED = 7

RENOISING = Sampler(stochasticity=1.0)
NIGHTLY = ("lcm", "sdxl", "flux-dev", "flux-schnell", "pixart-sigma", "pixart-alpha-1024")
EVERY = pytest.mark.parametrize(
    "name", ["sd3", "sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in NIGHTLY)]
)
Offer = Callable[..., str]


@pytest.fixture
def offer(comfy: Comfy) -> Offer:
    """Puts an export into models/fewstep, with another recipe if asked; gives its name."""

    def put(name: str, recipe: FewStepRecipe | None = None, **changes: Any) -> str:
        label = f"{name}-{len(list(shelf(comfy).iterdir()))}"
        folder = shelf(comfy) / label
        shutil.copytree(exported(name), folder)
        if recipe is not None:
            (folder / SIDECAR_NAME).write_text(recipe.to_json(), encoding="utf-8")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        sidecar = (folder / SIDECAR_NAME).read_bytes()
        stored = {"bytes": len(sidecar), "sha256": hashlib.sha256(sidecar).hexdigest()}
        manifest["files"][SIDECAR_NAME] = stored
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        return label

    return put


def shelf(comfy: Comfy) -> Path:
    """Where ComfyUI looks for exports."""
    folder = comfy.folder / "models" / "fewstep"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runtime_of(comfy: Comfy, label: str) -> FewStepRuntime:
    """The oracle."""
    return FewStepRuntime.load(shelf(comfy) / label, provider="cpu", threads=1, has_cache=False)


def loaded(graph: Graph, label: str) -> Node:
    """The node under test: MODEL, CLIP, VAE, recipe."""
    return graph.add("FewStepEngineLoader", folder=label, provider="cpu")


def drawn(graph: Graph, engine: Node, *, batch: int = 1, **sampling: Any) -> Node:
    """A picture by the pack's own sampler, of the usual size."""
    size = {"width": COLUMNS * STOCK_FACTOR, "height": ROWS * STOCK_FACTOR}
    sampled = graph.add(
        "FewStepKSampler",
        **{
            "model": engine,
            "positive": graph.add("CLIPTextEncode", clip=engine.out(1), text=PROMPT),
            "latent_image": graph.add("EmptyLatentImage", batch_size=batch, **size),
            "seed": SEED,
            "steps": 0,
            "denoise": 1.0,
            "noise": "reproducible (CPU)",
            **sampling,
        },
    )
    return graph.add("VAEDecode", samples=sampled, vae=engine.out(2))


def pixels(caught: torch.Tensor) -> np.ndarray:
    """An IMAGE in grey levels, not rounded."""
    return caught.numpy() * 255.0


def size_for(runtime: FewStepRuntime) -> tuple[int, int]:
    """(height, width) in pixels of the usual latents."""
    factor = int(runtime.folder.manifest.settings["vae_scale_factor"])
    return ROWS * factor, COLUMNS * factor


@EVERY
@pytest.mark.parametrize("sampler", [Sampler(), RENOISING], ids=["deterministic", "re-noising"])
def test_same_seed_same_picture(comfy: Comfy, offer: Offer, name: str, sampler: Sampler) -> None:
    label = offer(name, BY_NAME[name].recipe(sampler=sampler))
    graph = Graph()
    graph.capture(drawn(graph, loaded(graph, label), batch=2), "image")
    ours = pixels(comfy.run(graph.prompt)["image"])
    runtime = runtime_of(comfy, label)
    theirs = runtime(PROMPT, seed=SEED, num_images=2, size=size_for(runtime)).pixels
    assert theirs.std() > 1.0  # a picture, not one grey
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1.0


def test_guidance_has_both_sides_from_the_engine(comfy: Comfy, offer: Offer) -> None:
    guided = BY_NAME["sd15"].recipe(guidance=Guidance(mode="cfg", scale=3.0))
    label = offer("sd15", guided)
    graph = Graph()
    engine = loaded(graph, label)
    negative = graph.add("CLIPTextEncode", clip=engine.out(1), text=NEGATIVE)
    graph.capture(drawn(graph, engine, negative=negative), "image")
    ours = pixels(comfy.run(graph.prompt)["image"])
    runtime = runtime_of(comfy, label)
    theirs = runtime(PROMPT, NEGATIVE, seed=SEED, size=size_for(runtime)).pixels
    assert np.abs(ours - theirs).max() <= 1.0


@pytest.mark.slow
def test_a_latent_consistency_model_is_told_its_guidance(comfy: Comfy, offer: Offer) -> None:
    label = offer("lcm", BY_NAME["lcm"].recipe(guidance=Guidance(mode="embedded", scale=4.0)))
    graph = Graph()
    graph.capture(drawn(graph, loaded(graph, label)), "image")
    ours = pixels(comfy.run(graph.prompt)["image"])
    runtime = runtime_of(comfy, label)
    theirs = runtime(PROMPT, seed=SEED, size=size_for(runtime)).pixels
    assert np.abs(ours - theirs).max() <= 1.0


def test_stock_nodes_take_its_model_clip_and_vae(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3")
    graph = Graph()
    engine = loaded(graph, label)
    prompt = graph.add("CLIPTextEncode", clip=engine.out(1), text=PROMPT)
    picture = graph.add(
        "VAEDecodeTiled", samples=encoded(graph, engine), vae=engine.out(2), **TILES
    )
    sampled = graph.add(
        "KSampler",
        model=engine,
        seed=1,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        positive=prompt,
        negative=prompt,
        latent_image=encoded(graph, engine),
        denoise=0.5,
    )
    graph.capture(sampled, "latent")
    graph.capture(picture, "tiled")
    graph.capture(engine.out(3), "recipe")
    caught = comfy.run(graph.prompt)
    assert torch.isfinite(caught["latent"]["samples"]).all()
    assert caught["tiled"].shape[-1] == 3
    assert caught["recipe"].name == label
    assert "4 steps" in next(iter(comfy.ui.values()))["text"][0]


TILES = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}


def encoded(graph: Graph, engine: Node) -> Node:
    """Latents of a plain picture."""
    picture = graph.add("EmptyImage", width=24, height=18, batch_size=1, color=0x336699)
    return graph.add("VAEEncode", pixels=picture, vae=engine.out(2))


def test_a_picture_is_encoded_to_the_mean(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3")
    graph = Graph()
    graph.capture(encoded(graph, loaded(graph, label)), "latent")
    ours = comfy.run(graph.prompt)["latent"]["samples"].numpy()
    runtime = runtime_of(comfy, label)
    colour = np.array([0x33, 0x66, 0x99], np.float32) / np.float32(255.0)
    picture = np.broadcast_to(2.0 * colour[None, :, None, None] - 1.0, (1, 3, 18, 24))
    settings = runtime.folder.manifest.settings
    scaled = runtime._host.encode_image(
        np.ascontiguousarray(picture, np.float32), lambda shape: np.zeros(shape, np.float32)
    )
    theirs = scaled / settings["scaling_factor"] + settings["shift_factor"]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_memory_is_given_back_and_taken_again(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3")
    graph = Graph()
    engine = loaded(graph, label)
    graph.capture(engine, "model")
    graph.capture(drawn(graph, engine), "image")
    caught = comfy.run(graph.prompt)
    held = caught["model"].model.engine
    assert held._sessions
    caught["model"].clone().detach(unpatch_all=False)  # only another clone takes its place
    assert held._sessions
    caught["model"].detach()
    assert not held._sessions
    again = Graph()
    again.capture(drawn(again, loaded(again, label)), "image")
    assert torch.equal(comfy.run(again.prompt)["image"], caught["image"])


def failing(comfy: Comfy, graph: Graph, end: Node) -> str:
    """What the user reads."""
    graph.capture(end, "value")
    with pytest.raises(GraphFailed) as failure:
        comfy.run(graph.prompt)
    return failure.value.message


def test_a_wrong_size_lists_those_it_can_make(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd15")
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=40, height=48, batch_size=1)
    said = failing(comfy, graph, drawn(graph, loaded(graph, label), latent_image=latent))
    assert said == (
        f"'{label}' cannot make 10x12: width and height must be multiples of 4 (trained at 32x32); "
        "set the empty latent to such a size."
    )


def test_a_size_beyond_the_grid_of_places_names_the_largest(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3")
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=4096, height=64, batch_size=1)
    said = failing(comfy, graph, drawn(graph, loaded(graph, label), latent_image=latent))
    assert "cannot make 1024x16" in said
    assert " up to " in said


def test_a_lora_is_refused(comfy: Comfy, offer: Offer) -> None:
    from safetensors.torch import save_file

    label = offer("sd3")
    tensors = {"lora_unet_x.lora_down.weight": torch.zeros(1, 2)}
    save_file(tensors, comfy.folder / "loras" / "style.safetensors")
    graph = Graph()
    engine = loaded(graph, label)
    lora = {"lora_name": "style.safetensors", "strength_model": 1.0}
    said = failing(comfy, graph, graph.add("LoraLoaderModelOnly", model=engine, **lora))
    assert said == (
        f"A LoRA cannot change '{label}': the weights of an engine are fixed. Export the pipeline "
        "again with the LoRA merged, or use the model itself."
    )
    graph = Graph()
    engine = loaded(graph, label)
    both = graph.add("LoraLoader", model=engine, clip=engine.out(1), strength_clip=1.0, **lora)
    assert "the weights of an engine are fixed" in failing(comfy, graph, both)


def test_text_encoders_cannot_be_cut(comfy: Comfy, offer: Offer) -> None:
    graph = Graph()
    clip = loaded(graph, offer("sd3")).out(1)
    cut = graph.add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    assert '"CLIP Set Last Layer" cannot change' in failing(comfy, graph, cut)


def test_conditioning_of_another_model_is_refused(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd15")
    graph = Graph()
    other = graph.add("FewStepTestConditioning", seed=0, tokens=4, width=128, pooled=0)
    said = failing(comfy, graph, drawn(graph, loaded(graph, label), positive=other))
    assert said == (
        f"'{label}' reads text 8 wide, and this CONDITIONING has text 128 wide; encode the prompt "
        'with the CLIP of the same "Few-Step Engine Loader".'
    )


def test_patches_inside_the_network_are_refused(comfy: Comfy, offer: Offer) -> None:
    graph = Graph()
    engine = loaded(graph, offer("sd15"))
    graph.capture(engine, "model")
    model = comfy.run(graph.prompt)["model"]
    network = model.model.diffusion_model
    latent, time = torch.zeros(1, 4, 8, 8), torch.tensor([999.0])
    options = {"patches_replace": {"attn1": {}}}
    with pytest.raises(Exception, match="A patch of attn1 cannot reach into"):
        network(latent, time, torch.zeros(1, 1, 8), transformer_options=options)
    with pytest.raises(Exception, match="A ControlNet cannot reach into"):
        network(latent, time, torch.zeros(1, 1, 8), control={"output": []})


def test_a_family_comfyui_cannot_sample_is_named(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3", family="sana")
    graph = Graph()
    said = failing(comfy, graph, loaded(graph, label))
    assert said.startswith(
        f"'{label}' holds a sana model, and this node runs SD 1.x and 2.x (sd15)"
    )


def test_a_folder_elsewhere_is_no_choice(comfy: Comfy, offer: Offer) -> None:
    offer("sd3")
    graph = Graph()
    node = graph.add("FewStepEngineLoader", folder="../../outside", provider="cpu")
    assert "Value not in list" in failing(comfy, graph, node)


def test_folders_are_seen_when_they_are_changed(comfy: Comfy, offer: Offer) -> None:
    label = offer("sd3", replace(BY_NAME["sd3"].recipe(), sampler=RENOISING))
    node = comfy.nodes()["FewStepEngineLoader"]
    before = node.fingerprint_inputs(folder=label, provider="cpu")
    manifest = shelf(comfy) / label / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert node.fingerprint_inputs(folder=label, provider="cpu") != before
    shutil.rmtree(shelf(comfy) / label)
    assert "missing" in node.fingerprint_inputs(folder=label, provider="cpu")
