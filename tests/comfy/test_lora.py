"""The Few-Step LoRA Loader: every spelling gives the same weights, and nothing is half loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.adapters import read_header
from fewstep.comfy_nodes.lora_names import base_shapes
from fewstep.recipe import Lora
from tests.comfy.adapter_files import SPELLINGS, adapter_file, family_of
from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy, GraphFailed
from tests.comfy.references import PROMPT_SEED, network_scale, reference, relative_error
from tests.comfy.tiny_models import ALL_MODELS, SD3, SD15, WAN, TinyModel
from tests.conversion_checks import comfyui_deltas, read
from tests.conversion_families import IN_COMFYUI

SEED = 5
PARITY = 1e-5
WIDGETS = {"steps": 0, "denoise": 1.0, "noise": "reproducible (CPU)"}


def base(graph: Graph, comfy: Comfy, model: TinyModel) -> Node:
    return graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default")


def loader(graph: Graph, model: Node, file: Path, **more: Any) -> Node:
    """The node, with its widgets as they are when it is dropped in."""
    return graph.add(
        "FewStepLoraLoader", model=model, lora_name=file.name, **{"strength": 1.0, **more}
    )


def drawn(graph: Graph, comfy: Comfy, model: TinyModel, patched: Node, **more: Any) -> torch.Tensor:
    """What Few-Step KSampler draws, in the network's scale."""
    kind, inputs = model.empty_latent
    sampled = graph.add(
        "FewStepKSampler",
        model=patched,
        positive=graph.add("FewStepTestConditioning", seed=PROMPT_SEED, **model.conditioning),
        latent_image=graph.add(kind, **inputs),
        seed=SEED,
        **{**WIDGETS, **more},
    )
    graph.capture(sampled, "latent")
    return network_scale(model, comfy.run(graph.prompt)["latent"]["samples"])


def patched_weights(comfy: Comfy, model: TinyModel, file: Path, **more: Any) -> dict[str, Any]:
    """ComfyUI's weight name -> what the loaded MODEL adds to it."""
    import comfy.lora as lora  # pyright: ignore[reportMissingImports]

    graph = Graph()
    graph.capture(loader(graph, base(graph, comfy, model), file, **more), "model")
    patcher = comfy.run(graph.prompt)["model"]
    weights = patcher.model.state_dict()
    return {
        name: lora.calculate_weight(patches, torch.zeros_like(weights[name]), name)
        for name, patches in patcher.patches.items()
    }


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: model.name)
def test_pictures_with_a_diffusers_file_equal_the_pipelines(comfy: Comfy, model: TinyModel) -> None:
    recipe = model.recipe(model.family)
    file = adapter_file(comfy.folder / "loras" / f"{model.name}.safetensors", model, recipe)
    graph = Graph()
    latents = drawn(graph, comfy, model, loader(graph, base(graph, comfy, model), file))
    expected = reference(model, recipe, seed=SEED, adapter=file)
    assert relative_error(latents, expected) < PARITY
    assert relative_error(latents, reference(model, recipe, seed=SEED)) > 1e-3


@pytest.mark.parametrize("model", [SD3, SD15, WAN], ids=lambda model: model.name)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_changes_the_weights_alike(
    comfy: Comfy, model: TinyModel, spelling: str
) -> None:
    recipe = model.recipe(model.family)
    path = comfy.folder / "loras" / f"{model.name}-{spelling}.safetensors"
    file = adapter_file(path, model, recipe, spelling=spelling)
    plain = adapter_file(path.with_name(f"{model.name}-plain.safetensors"), model, recipe)
    changed = patched_weights(comfy, model, file)
    expected = comfyui_deltas(family_of(model), read(plain, family_of(model)))
    assert changed.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(changed[name].reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_model_of_an_unknown_family_is_served_by_comfyuis_own_names(
    comfy: Comfy, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.comfy_nodes.lora_loading.family_of", lambda model: None)
    path = comfy.folder / "loras" / f"unknown-{spelling}.safetensors"
    file = adapter_file(path, SD3, SD3.recipe("sd3"), spelling=spelling)
    plain = adapter_file(path.with_name("unknown-plain.safetensors"), SD3, SD3.recipe("sd3"))
    changed = patched_weights(comfy, SD3, file)
    expected = comfyui_deltas(family_of(SD3), read(plain, family_of(SD3)))
    assert changed.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(changed[name].reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)


def test_strength_and_the_recipes_scale_multiply(comfy: Comfy) -> None:
    recipe = replace(SD3.recipe("sd3"), lora=Lora(scale=0.25))
    file = adapter_file(comfy.folder / "loras" / "scaled.safetensors", SD3, recipe)
    changed = patched_weights(comfy, SD3, file, strength=2.0)
    expected = comfyui_deltas(family_of(SD3), read(file, family_of(SD3)))
    for name, delta in expected.items():
        torch.testing.assert_close(changed[name], 0.5 * delta, rtol=1e-5, atol=1e-6)


def test_strength_0_leaves_the_model_alone(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "off.safetensors", SD3, SD3.recipe("sd3"))
    graph = Graph()
    loaded = loader(graph, base(graph, comfy, SD3), file, strength=0.0)
    graph.capture(loaded, "model")
    graph.capture(loaded.out(1), "recipe")
    caught = comfy.run(graph.prompt)
    assert caught["model"].get_attachment("fewstep") is None
    assert not caught["model"].patches
    assert caught["recipe"].recipe == SD3.recipe("sd3")


def test_the_node_tells_what_it_loaded(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "telling.safetensors", SD3, SD3.recipe("sd3"))
    graph = Graph()
    loaded = loader(graph, base(graph, comfy, SD3), file)
    graph.capture(loaded, "model")
    comfy.run(graph.prompt)
    text = comfy.ui[loaded.id]["text"][0]
    count = len(family_of(SD3).modules())
    assert "4 steps" in text
    assert text.endswith(f"{count}/{count} weights")


def test_the_recipe_survives_a_style_lora(comfy: Comfy) -> None:
    recipe = SD3.recipe("sd3")
    file = adapter_file(comfy.folder / "loras" / "few.safetensors", SD3, recipe)
    style = adapter_file(comfy.folder / "loras" / "style.safetensors", SD3, None, seed=3)
    graph = Graph()
    few = loader(graph, base(graph, comfy, SD3), file)
    graph.capture(
        graph.add("LoraLoaderModelOnly", model=few, lora_name=style.name, strength_model=0.5),
        "model",
    )
    named = comfy.run(graph.prompt)["model"].get_attachment("fewstep")
    assert named is not None
    assert named.recipe == recipe
    assert named.name == "few.safetensors"


def test_what_does_not_fit_is_counted(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "odd.safetensors", SD3, SD3.recipe("sd3"))
    tensors, metadata = load_file(file), read_header(file).metadata
    tensors["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = torch.ones(2, 128)
    tensors["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = torch.ones(128, 2)
    save_file(tensors, file, metadata=metadata)
    total = len(family_of(SD3).modules()) + 1
    graph = Graph()
    graph.capture(loader(graph, base(graph, comfy, SD3), file), "model")
    with pytest.raises(GraphFailed) as failed:
        comfy.run(graph.prompt)
    assert failed.value.message.startswith(
        f"Only {total - 1} of {total} adapter weights match this model (first unmatched: "
        "transformer.transformer_blocks.7.attn.to_q). A half-loaded few-step adapter gives blurred "
        "images."
    )
    graph = Graph()
    loaded = loader(graph, base(graph, comfy, SD3), file, unmatched_keys="warn")
    graph.capture(loaded, "model")
    assert comfy.run(graph.prompt)["model"].patches
    assert f"Warning: Only {total - 1} of {total}" in comfy.ui[loaded.id]["text"][0]


def test_layers_of_another_size_do_not_count_as_loaded(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "wide.safetensors", SD3, SD3.recipe("sd3"))
    tensors, metadata = load_file(file), read_header(file).metadata
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    tensors[name] = torch.ones(130, tensors[name].shape[1])
    save_file(tensors, file, metadata=metadata)
    graph = Graph()
    graph.capture(loader(graph, base(graph, comfy, SD3), file), "model")
    with pytest.raises(GraphFailed, match=r"first unmatched: .*blocks\.0\.attn\.to_q"):
        comfy.run(graph.prompt)


def test_another_base_is_refused_by_name(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "for15.safetensors", SD15, SD15.recipe("sd15"))
    graph = Graph()
    graph.capture(loader(graph, base(graph, comfy, SD3), file), "model")
    with pytest.raises(GraphFailed) as failed:
        comfy.run(graph.prompt)
    assert failed.value.message == (
        "This adapter was trained for SD 1.5 (epsilon), but MODEL is SD3 (flow). Load an SD 1.5 "
        'checkpoint, or set base_check to "warn".'
    )


def test_a_second_few_step_adapter_is_refused(comfy: Comfy) -> None:
    recipe = SD3.recipe("sd3")
    first = adapter_file(comfy.folder / "loras" / "first.safetensors", SD3, recipe)
    second = adapter_file(comfy.folder / "loras" / "second.safetensors", SD3, recipe, seed=1)
    graph = Graph()
    graph.capture(loader(graph, loader(graph, base(graph, comfy, SD3), first), second), "model")
    with pytest.raises(GraphFailed, match="carries the few-step adapter 'first.safetensors'"):
        comfy.run(graph.prompt)


def test_a_file_without_recipe_says_what_to_do(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "plain.safetensors", SD3, None)
    graph = Graph()
    graph.capture(loader(graph, base(graph, comfy, SD3), file), "model")
    with pytest.raises(GraphFailed, match="'plain.safetensors' has no few-step recipe"):
        comfy.run(graph.prompt)


def test_the_shift_of_the_recipe_reaches_percents_and_no_timestep(comfy: Comfy) -> None:
    recipe = SD3.recipe("sd3")
    schedule = replace(recipe.base.schedule, shift=6.0)
    recipe = replace(recipe, base=replace(recipe.base, schedule=schedule))
    file = adapter_file(comfy.folder / "loras" / "shifted.safetensors", SD3, recipe)
    graph = Graph()
    plain = base(graph, comfy, SD3)
    graph.capture(plain, "plain")
    graph.capture(loader(graph, plain, file), "model")
    caught = comfy.run(graph.prompt)
    before, after = (caught[name].get_model_object("model_sampling") for name in ("plain", "model"))
    assert after.percent_to_sigma(0.5) == pytest.approx(6.0 * 0.5 / (1 + 5.0 * 0.5))
    assert before.percent_to_sigma(0.5) == pytest.approx(3.0 * 0.5 / (1 + 2.0 * 0.5))
    sigmas = torch.tensor([1.0, 0.7, 0.2])
    assert torch.equal(before.timestep(sigmas), after.timestep(sigmas))


def test_the_pipelines_shapes_are_seen_in_comfyuis_names(comfy: Comfy) -> None:
    """Every family that has a name table, on ComfyUI's own classes."""
    import comfy.supported_models as supported  # pyright: ignore[reportMissingImports]

    for family in IN_COMFYUI:
        if family.component == "unet":
            continue
        kind = vars(supported)[family.comfy_class or ""]
        config = kind({**kind.unet_config, **family.comfy_config})
        config.set_inference_dtype(torch.float32, None)
        network = config.get_model({}, "", device="meta")
        native = {
            name.removeprefix("diffusion_model."): tuple(values.shape)
            for name, values in network.state_dict().items()
        }
        found = base_shapes(family.name, native)
        assert found is not None
        wanted = {n: s for n, s in family.modules().items() if not n.startswith("t_embedder")}
        seen = {n.removesuffix(".weight"): shape for n, shape in found.items() if n.endswith("ht")}
        assert {name: seen.get(name) for name in wanted} == wanted, family.name
