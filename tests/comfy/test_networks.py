"""Before anything of ours: ComfyUI's own Euler, told a recipe's sigmas, equals FewStepPipeline.

What differs from here on is ours.
"""

from dataclasses import replace

import pytest

from fewstep.recipe import FewStepRecipe, Sampler
from tests.comfy.graph import Graph
from tests.comfy.harness import Comfy
from tests.comfy.references import PROMPT_SEED, network_scale, reference, relative_error
from tests.comfy.tiny_models import ALL_MODELS, TinyModel

SEED = 5
PARITY = 1e-5


def as_comfyui_starts(model: TinyModel) -> FewStepRecipe:
    """A recipe whose first sample is noise of deviation 1, as ComfyUI's is for SD1.5."""
    return replace(model.recipe(model.family), sampler=Sampler(first_noise="unit"))


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: model.name)
def test_euler_with_the_recipes_sigmas(comfy: Comfy, model: TinyModel) -> None:
    recipe = as_comfyui_starts(model)
    sigmas = [level.sigma / (1.0 if model.is_flow else level.alpha) for level in recipe.levels()]
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default")
    watched = graph.add("FewStepTestSpy", model=loaded, name="network")
    prompt = graph.add("FewStepTestConditioning", seed=PROMPT_SEED, **model.conditioning)
    kind, inputs = model.empty_latent
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=graph.add("BasicGuider", model=watched, conditioning=prompt),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.add("ManualSigmas", sigmas=", ".join(map(repr, sigmas))),
        latent_image=graph.add(kind, **inputs),
    )
    graph.capture(sampled, "latent")
    latents = network_scale(model, comfy.run(graph.prompt)["latent"]["samples"])
    assert relative_error(latents, reference(model, recipe, seed=SEED)) <= PARITY
    told = [float(call["timestep"][0]) for call in comfy.seen()]
    assert told == pytest.approx(recipe.grids[0].timesteps)
