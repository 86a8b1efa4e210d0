"""Nodes for ComfyUI's own sampling sockets: SAMPLER and SIGMAS of a recipe, or without one."""

from typing import Any

import torch
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.few_step_sampler import build_sampling, kept_steps
from fewstep.comfy_nodes.model_recipe import resolve
from fewstep.comfy_nodes.noise_stream import REPRODUCIBLE, STREAMS
from fewstep.comfy_nodes.sigma_lists import KINDS, TERMINALS, listed_sigmas, sigma_table
from fewstep.comfy_nodes.sockets import NamedRecipe, RecipeSocket
from fewstep.comfy_nodes.step_loop import stochastic_sampler

CATEGORY = "few-step/sampling"


def noise_input(tooltip: str) -> Any:
    """The choice of noise streams; an advanced one where ComfyUI has those."""
    return accepted(
        io.Combo.Input,
        "noise",
        options=list(STREAMS),
        default=REPRODUCIBLE,
        tooltip=tooltip,
        optional=True,
        advanced=True,
    )


def steps_input() -> Any:
    """How many steps; an advanced choice where ComfyUI has those."""
    return accepted(
        io.Int.Input,
        "steps",
        default=0,
        min=0,
        max=1000,
        tooltip="0 takes the recipe's own step count. Other counts only work where the recipe "
        "lists them.",
        optional=True,
        advanced=True,
    )


def denoise_input() -> Any:
    """Image to image; an advanced choice where ComfyUI has those."""
    return accepted(
        io.Float.Input,
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Below 1, the latent image is noised to the trained step nearest to this strength "
        "and sampled from there. Trained steps are kept as they are, so there are only as many "
        "strengths as steps.",
        optional=True,
        advanced=True,
    )


class FewStepSampling(io.ComfyNode):
    """SAMPLER and SIGMAS of a recipe, from one node so that the two agree."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepSampling",
            display_name="Few-Step Sampling",
            category=CATEGORY,
            description="The sampler and the exact sigmas a few-step model was trained with, for "
            "SamplerCustomAdvanced. Same seed, same picture as fewstep's FewStepPipeline; every "
            'picture of a batch equals it with "Few-Step KSampler" only, as RandomNoise draws one '
            "block of noise for all.",
            search_aliases=["few-step sampler", "lcm", "dmd2", "lightning", "turbo", "tcd"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample, adapter loaded."),
                RecipeSocket.Input(
                    "recipe",
                    optional=True,
                    tooltip="How to sample. Left open, the recipe that came with the adapter.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The latent that will be sampled. Only needed by models whose sigmas "
                    "depend on the picture's size; the node says so.",
                ),
                steps_input(),
                denoise_input(),
                noise_input(
                    "Fresh noise of re-noising steps: continued from the initial noise on the "
                    "CPU, the same on every machine, or drawn as ComfyUI's own samplers do."
                ),
            ],
            outputs=[
                io.Sampler.Output(tooltip="Connect both to SamplerCustomAdvanced."),
                io.Sigmas.Output(
                    tooltip="The trained sigmas of this model. May be split with SplitSigmas."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        recipe: NamedRecipe | None = None,
        latent_image: dict[str, Any] | None = None,
        steps: int = 0,
        denoise: float = 1.0,
        noise: str = REPRODUCIBLE,
    ) -> io.NodeOutput:
        named = resolve(model, recipe)
        shape = None if latent_image is None else latent_image["samples"].shape
        sampler, sigmas = build_sampling(
            model, named, steps=steps, denoise=denoise, noise=noise, latent_shape=shape
        )
        num_steps = named.recipe.grid(steps or None).num_steps
        table = sigma_table(sigmas.tolist(), model.get_model_object("model_sampling"))
        lines = [named.name, table, kept_steps(sigmas, num_steps, denoise)]
        text = ui.PreviewText("\n".join(line for line in lines if line))
        return io.NodeOutput(sampler, sigmas, ui=text)


class FewStepSigmas(io.ComfyNode):
    """SIGMAS from a list as people write it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepSigmas",
            display_name="Few-Step Sigmas",
            category=CATEGORY,
            description="Exact sigmas for any few-step LoRA, from the timesteps or sigmas its "
            "authors state. Checks the list and shows what the model makes of it.",
            search_aliases=["manual sigmas", "timesteps", "custom sigmas", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.String.Input(
                    "values",
                    default="999, 749, 499, 249",
                    tooltip="The list the authors state, from most noise to least.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="What the numbers are: timesteps (0 to 1000), sigmas as ComfyUI counts "
                    "them, or a flow model's sigmas before its shift.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip='Only for "unshifted + shift": the shift. 0 takes the model\'s own.',
                ),
                io.Combo.Input(
                    "terminal",
                    options=list(TERMINALS),
                    default=TERMINALS[0],
                    tooltip="Where sampling ends: at clean data, at the model's least noise (TCD), "
                    "or at the last number of the list.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced, with any sampler.")],
        )

    @classmethod
    def execute(
        cls, model: Any, values: str, kind: str, shift: float, terminal: str
    ) -> io.NodeOutput:
        model_sampling = model.get_model_object("model_sampling")
        sigmas = listed_sigmas(values, model_sampling, kind=kind, shift=shift, terminal=terminal)
        text = ui.PreviewText(sigma_table(sigmas, model_sampling))
        return io.NodeOutput(torch.tensor(sigmas), ui=text)


class SamplerFewStep(io.ComfyNode):
    """A SAMPLER for any sigmas, from Euler to re-noising."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="SamplerFewStep",
            display_name="Sampler Few-Step",
            category=CATEGORY,
            description="One sampler for all few-step models: Euler, LCM and DMD2 re-noising, and "
            "TCD between them, for flow and Stable Diffusion models. Takes any sigmas.",
            search_aliases=["tcd", "lcm", "dmd2", "euler", "ksamplerselect"],
            inputs=[
                io.Float.Input(
                    "stochasticity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is Euler (DDIM), 1 re-noises at every step (LCM, DMD2), between is "
                    "TCD's gamma.",
                ),
                noise_input(
                    "Fresh noise: continued from RandomNoise on the CPU, the same on every "
                    "machine, or drawn as ComfyUI's own samplers do."
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="In place of KSamplerSelect.")],
        )

    @classmethod
    def execute(cls, stochasticity: float, noise: str = REPRODUCIBLE) -> io.NodeOutput:
        return io.NodeOutput(stochastic_sampler(stochasticity, noise))
