"""The sampling nodes in ComfyUI: the explicit graph, interruption, lists of sigmas, words."""

from typing import Any

import pytest
import torch

from fewstep.recipe import FewStepRecipe
from tests.comfy.harness import Comfy
from tests.comfy.references import (
    latent_scale,
    network_scale,
    reference,
    relative_error,
)
from tests.comfy.sampler_bench import BOTH, CLOSE, SEED, Bench, bench, recipe_of
from tests.comfy.tiny_models import SD3, SD15, TinyModel


def attached(here: Bench, recipe: FewStepRecipe) -> Any:
    """MODEL with a recipe on it, as our loader makes it."""
    from fewstep.comfy_nodes.model_recipe import attach
    from fewstep.comfy_nodes.sockets import NamedRecipe

    model = here.patcher.clone()
    attach(model, NamedRecipe(recipe, "tiny"))
    return model


def execute(comfy: Comfy, node: str, **inputs: Any) -> tuple[tuple[Any, ...], str]:
    """What a node of ours gives, and what it shows."""
    output = comfy.nodes()[node].execute(**inputs)
    shown = output.ui.as_dict()["text"][0] if output.ui is not None else ""
    return output.args, shown


@BOTH
@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_the_ksampler_is_the_explicit_graph(comfy: Comfy, model: TinyModel, denoise: float) -> None:
    here = bench(comfy, model)
    ready = attached(here, recipe_of(model, 1.0))
    image = here.empty() if denoise == 1.0 else latent_scale(model, here.noise())
    (sampler, sigmas), table = execute(comfy, "FewStepSampling", model=ready, denoise=denoise)
    (guider,), _ = execute(comfy, "FewStepGuider", model=ready, positive=here.prompt)
    (noise,), _ = execute(comfy, "RandomNoise", noise_seed=SEED)
    explicit, _ = execute(
        comfy,
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image={"samples": image},
    )
    both, note = execute(
        comfy,
        "FewStepKSampler",
        model=ready,
        positive=here.prompt,
        latent_image={"samples": image},
        seed=SEED,
        denoise=denoise,
    )
    for ours, expected in zip(both, explicit, strict=True):
        assert torch.equal(ours["samples"], expected["samples"])
    assert table.splitlines()[0] == "tiny"
    if denoise == 1.0:
        assert note == ""
    else:
        assert note in table
        assert note.startswith(f"denoise {denoise:.2f} keeps {len(sigmas) - 1} of 4 steps (sigma ")
        assert note.endswith(". Few-step adapters have only 4 strengths.")


def test_the_ksampler_makes_room_for_the_models_channels(comfy: Comfy) -> None:
    """An empty latent of Stable Diffusion's four channels serves SD3 too."""
    here = bench(comfy, SD3)
    (latent, _), _ = execute(
        comfy,
        "FewStepKSampler",
        model=attached(here, recipe_of(SD3)),
        positive=here.prompt,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        seed=SEED,
    )
    expected = reference(SD3, recipe_of(SD3), seed=SEED)
    assert relative_error(network_scale(SD3, latent["samples"]), expected) < CLOSE


def test_comfyui_can_interrupt_it(comfy: Comfy) -> None:
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    here = bench(comfy, SD3)
    comfy.interrupt_at = 2
    try:
        with pytest.raises(management.InterruptProcessingException):
            execute(
                comfy,
                "FewStepKSampler",
                model=attached(here, recipe_of(SD3)),
                positive=here.prompt,
                latent_image={"samples": here.empty()},
                seed=SEED,
            )
    finally:
        comfy.interrupt_at = None
    assert comfy.progress[-1] == (2, 4)


def test_sigmas_of_a_list(comfy: Comfy) -> None:
    here = bench(comfy, SD15)
    (sigmas,), table = execute(
        comfy,
        "FewStepSigmas",
        model=here.patcher,
        values="999, 749, 499, 249",
        kind="timesteps",
        shift=0.0,
        terminal="zero",
    )
    assert torch.equal(sigmas, here.build(recipe_of(SD15))[1])
    assert [line.split()[1] for line in table.splitlines()[1:-1]] == [
        "999.0",
        "749.0",
        "499.0",
        "249.0",
    ]
    (shifted,), _ = execute(
        comfy,
        "FewStepSigmas",
        model=bench(comfy, SD3).patcher,  # its own shift is 3
        values="1, 0.5",
        kind="unshifted + shift",
        shift=0.0,
        terminal="zero",
    )
    assert shifted.tolist() == pytest.approx([1.0, 0.75, 0.0])


def test_the_free_sampler_node(comfy: Comfy) -> None:
    here = bench(comfy, SD3)
    (sampler,), _ = execute(comfy, "SamplerFewStep", stochasticity=1.0)
    own, sigmas = here.build(recipe_of(SD3, 1.0))
    assert relative_error(here.run(sampler, sigmas), here.run(own, sigmas)) < CLOSE


def test_inputs_and_outputs_are_explained(comfy: Comfy) -> None:
    for name in ("FewStepKSampler", "FewStepSampling", "FewStepSigmas", "SamplerFewStep"):
        schema = comfy.nodes()[name].define_schema()
        assert schema.description
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{name}.{socket.id}"
