"""The shipped digits pipeline, a real text-to-image model, end to end in ComfyUI.

Its transformer is an SD3 of ComfyUI's and its autoencoder a TAESD; only the text encoder is not
one of ComfyUI's sizes, so the test kit brings the embeddings.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.adapters import save_adapter
from fewstep.digits.classifier import to_tensor
from fewstep.digits.judge import CLASSIFIER_FILE, load_classifier
from fewstep.digits.teacher_sampler import load_teacher
from fewstep.digits.teachers import T5_LENGTH
from fewstep.digits.weights import teacher_folder
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Base, FewStepRecipe, Grid, Guidance, Schedule
from tests.comfy.graph import Graph
from tests.comfy.harness import Comfy
from tests.comfy.references import input_file, relative_error
from tests.comfy.tiny_vae import save_vae

DIGITS = ("zero", "three", "seven")
LABELS = (0, 3, 7)
SEED = 4
FLOW = Schedule(kind="flow", shift=3.0)


def teacher_recipe(num_steps: int, guidance: float) -> FewStepRecipe:
    """The teacher's own settings: an even grid, shifted as SD3's, and its guidance."""
    schedule = FLOW.build()
    timesteps = schedule.uniform_timesteps(num_steps)
    sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
    mode: Any = "none" if guidance == 1.0 else "cfg"
    negative: Any = "inert" if guidance == 1.0 else "works"
    return FewStepRecipe(
        base=Base(family="sd3", prediction="flow", schedule=FLOW, max_sequence_length=T5_LENGTH),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas),),
        default_steps=num_steps,
        guidance=Guidance(mode=mode, scale=guidance, negative_prompt=negative),
    )


@pytest.fixture(scope="module")
def teacher(comfy: Comfy) -> Any:
    """The pipeline; its weights are in ComfyUI's folders."""
    pipe = load_teacher(teacher_folder("sd3"))
    pipe.set_progress_bar_config(disable=True)
    weights = {name: value.contiguous() for name, value in pipe.transformer.state_dict().items()}
    save_file(weights, comfy.folder / "diffusion_models" / "digits.safetensors")
    save_vae(comfy.folder, pipe.vae.state_dict())
    return pipe


def embeddings(teacher: Any, comfy: Comfy, text: str, name: str) -> str:
    """A prompt in ComfyUI's input folder."""
    sequence, _, pooled, _ = teacher.encode_prompt(
        text, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return input_file(comfy.folder, f"{name}.safetensors", cond=sequence, pooled=pooled)


def drawn(comfy: Comfy, teacher: Any, text: str, recipe: FewStepRecipe, **more: Any) -> Any:
    """What the Few-Step nodes draw: latents in the network's scale, and the picture, 0 to 1."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="digits.safetensors", weight_dtype="default")
    if "lora" in more:
        model = graph.add("FewStepLoraLoader", model=model, lora_name=more["lora"])
    prompt = graph.add(
        "FewStepTestConditioning", file=embeddings(teacher, comfy, text, "digits-prompt")
    )
    negative = graph.add(
        "FewStepTestConditioning", file=embeddings(teacher, comfy, "", "digits-negative")
    )
    sampled = graph.add(
        "FewStepKSampler",
        model=model,
        positive=prompt,
        negative=negative,
        latent_image=graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        seed=SEED,
        recipe=graph.add("FewStepTestRecipe", json=recipe.to_json(), name="digits teacher"),
    )
    vae = graph.add("VAELoader", vae_name="taesd3")
    graph.capture(sampled, "latent")
    graph.capture(graph.add("VAEDecode", samples=sampled, vae=vae), "picture")
    caught = comfy.run(graph.prompt)
    import comfy.latent_formats as formats  # pyright: ignore[reportMissingImports]

    return formats.SD3().process_in(caught["latent"]["samples"]), caught["picture"]


def test_the_teacher_draws_the_digit_that_was_asked_for(comfy: Comfy, teacher: Any) -> None:
    recipe = teacher_recipe(20, 1.2)
    pictures = [drawn(comfy, teacher, f"a handwritten {digit}", recipe)[1][0] for digit in DIGITS]
    images = (255 * torch.stack(pictures)).round().byte()
    recognised = load_classifier(CLASSIFIER_FILE)(to_tensor(images)).argmax(dim=1)
    assert recognised.tolist() == list(LABELS)


def test_latents_and_pixels_equal_the_pipelines(comfy: Comfy, teacher: Any) -> None:
    recipe = teacher_recipe(4, 1.2)
    latents, picture = drawn(comfy, teacher, "a handwritten seven", recipe)
    pipe = FewStepPipeline.wrap(teacher, recipe=recipe)
    try:
        expected: Tensor = pipe("a handwritten seven", seed=SEED, output_type="latent")[0]
        pixels: np.ndarray = pipe("a handwritten seven", seed=SEED, output_type="np")[0]
    finally:
        pipe.unwrap()
    assert relative_error(latents, expected) <= 1e-5
    assert np.abs(picture.numpy() - pixels).max() <= 1e-4


def test_a_few_step_adapter_of_it(comfy: Comfy, teacher: Any) -> None:
    recipe = teacher_recipe(4, 1.0)
    file = random_adapter(comfy.folder / "loras" / "digits.safetensors", teacher, recipe)
    latents, _ = drawn(comfy, teacher, "a handwritten seven", recipe, lora=file.name)
    pipe = FewStepPipeline.wrap(teacher, recipe=recipe, adapter=file)
    try:
        expected: Tensor = pipe("a handwritten seven", seed=SEED, output_type="latent")[0]
    finally:
        pipe.unwrap()
    assert relative_error(latents, expected) <= 1e-5


def random_adapter(path: Path, teacher: Any, recipe: FewStepRecipe) -> Path:
    """A LoRA on the attention of the digits transformer, as fewstep writes adapters."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in teacher.transformer.named_modules():
        if name.endswith(("to_q", "to_v")):
            down = torch.randn(4, module.in_features, generator=generator)
            up = 0.1 * torch.randn(module.out_features, 4, generator=generator)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return save_adapter(path, tensors, recipe=recipe, rank=4, alpha=8.0, title="digits")
