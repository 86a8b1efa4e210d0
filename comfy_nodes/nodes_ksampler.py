"""The node that most people need: everything a recipe says, in one sampler."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.model_management  # pyright: ignore[reportMissingImports]
import comfy.sample  # pyright: ignore[reportMissingImports]
import comfy.utils  # pyright: ignore[reportMissingImports]
import latent_preview  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]
from torch import Tensor

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.few_step_sampler import FewStepSampler, build_sampling, kept_steps
from fewstep.comfy_nodes.model_recipe import resolve
from fewstep.comfy_nodes.nodes_sampling import denoise_input, noise_input, steps_input
from fewstep.comfy_nodes.noise_stream import REPRODUCIBLE, first_noise, image_streams
from fewstep.comfy_nodes.sockets import NamedRecipe, RecipeSocket
from fewstep.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """What a run gives.

    Attributes:
        samples: The sample at the end of the sigmas, as ComfyUI's latents.
        denoised: The last predicted clean data, the same.
    """

    samples: Tensor
    denoised: Tensor


class FewStepKSampler(io.ComfyNode):
    """Guidance, sampler, sigmas, experts and noise from the recipe."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepKSampler",
            display_name="Few-Step KSampler",
            category="few-step",
            description="Samples a few-step model as it was trained: steps, sigmas, sampler, "
            "guidance and phase experts come from its recipe. Same seed, same picture as fewstep's "
            "FewStepPipeline, for every picture of a batch.",
            search_aliases=["ksampler", "few-step sampler", "lightning", "turbo", "dmd2", "lcm"],
            inputs=[
                io.Model.Input(
                    "model", tooltip='The model to sample, from "Few-Step LoRA Loader".'
                ),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the picture's size, or a picture to start from.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the first picture; those after it in a batch have seed + 1, ...",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the picture shall not show. Only recipes with guidance look at "
                    "it; the node says so.",
                ),
                RecipeSocket.Input(
                    "recipe",
                    optional=True,
                    tooltip="How to sample. Left open, the recipe that came with the adapter.",
                ),
                denoise_input(),
                steps_input(),
                noise_input(
                    "reproducible: drawn on the CPU, picture by picture, as fewstep draws it "
                    "everywhere. ComfyUI default: as ComfyUI's own samplers draw it."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The picture; decode it."),
                io.Latent.Output(
                    display_name="denoised", tooltip="The last prediction of the clean picture."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list[Any],
        latent_image: dict[str, Any],
        seed: int,
        negative: list[Any] | None = None,
        recipe: NamedRecipe | None = None,
        denoise: float = 1.0,
        steps: int = 0,
        noise: str = REPRODUCIBLE,
    ) -> io.NodeOutput:
        from fewstep.comfy_nodes.expert_guider import make_guider

        named = resolve(model, recipe)
        latent = dict(latent_image)
        latent["samples"] = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        sampler, sigmas = build_sampling(
            model,
            named,
            steps=steps,
            denoise=denoise,
            noise=noise,
            latent_shape=latent["samples"].shape,
        )
        guider = make_guider(model, positive, negative, named, guidance=None)
        sampled = sample_latent(guider, sampler, sigmas, latent, seed, noise)
        note = kept_steps(sigmas, named.recipe.grid(steps or None).num_steps, denoise)
        return io.NodeOutput(
            {**latent, "samples": sampled.samples},
            {**latent, "samples": sampled.denoised},
            ui=None if note is None else ui.PreviewText(note),
        )


def sample_latent(
    guider: Any,
    sampler: FewStepSampler,
    sigmas: Tensor,
    latent: dict[str, Any],
    seed: int,
    noise: str,
) -> Sampled:
    """Run a GUIDER over a latent with noise of its own, as SamplerCustomAdvanced does with given.

    Args:
        guider: From `make_guider`.
        sampler: From `build_sampling`.
        sigmas: Its sigmas.
        latent: A LATENT; `noise_mask` and `batch_index` are honoured.
        seed: Of the first picture.
        noise: One of `noise_stream.STREAMS`.
    """
    samples, indices = latent["samples"], latent.get("batch_index")
    if noise == REPRODUCIBLE:
        first = _reproducible(samples, seed, indices)
        sampler = sampler.with_streams(image_streams(indices))
    else:
        first = comfy.sample.prepare_noise(samples, seed, indices)
    seen: dict[str, Tensor] = {}
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1, seen)
    made = guider.sample(
        first,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    made = made.to(comfy.model_management.intermediate_device())
    denoised = guider.model_patcher.model.process_latent_out(seen["x0"].cpu())
    return Sampled(made, denoised)


def _reproducible(samples: Tensor, seed: int, indices: Sequence[int] | None) -> Tensor:
    if samples.is_nested:
        raise ConfigError(
            "A latent of video and audio has no reproducible noise yet; set noise to "
            '"ComfyUI default".'
        )
    return first_noise(seed, samples, indices)
