"""The same picture twice: by the Few-Step nodes in ComfyUI, and by FewStepPipeline.

Every cell of the parity table is one call of `parity_error`; the tests assert it and `table.py`
writes it down.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.recipe import Expert, FewStepRecipe
from tests.comfy import references
from tests.comfy.adapter_files import adapter_file
from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy
from tests.comfy.testkit import latents as random_latents
from tests.comfy.tiny_models import WAN, TinyModel

SEED = 5
PARITY = 1e-5
"""Largest relative L2 error of the latents."""
STRENGTH = 0.5
"""Of image to image."""
PICTURE_SEED = 21
HIGH, LOW = "high_noise", "low_noise"

SAMPLERS = {"deterministic": 0.0, "re-noise": 1.0, "TCD 0.3": 0.3}
"""Name in the table -> stochasticity."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Both sides of one cell, as far as all cases go alike.

    Attributes:
        comfy: A booted ComfyUI.
        model: The tiny model.
        recipe: How it is sampled.
        name: For files.
    """

    comfy: Comfy
    model: TinyModel
    recipe: FewStepRecipe
    name: str

    def in_comfyui(
        self,
        *,
        files: tuple[Path, ...] = (),
        latent: Callable[[Graph], Node] | None = None,
        **widgets: Any,
    ) -> Tensor:
        """Loaders, a prompt and FewStepKSampler; in the network's scale.

        Args:
            files: Adapters, a Few-Step LoRA Loader each; without any the recipe is connected.
            latent: Adds the latent; None is an empty one of the model's kind.
            **widgets: Of FewStepKSampler.
        """
        graph = Graph()
        model = base(graph, self.comfy, self.model)
        for file in files:
            model = graph.add("FewStepLoraLoader", model=model, lora_name=file.name, strength=1.0)
        inputs = dict(widgets)
        if not files:
            inputs["recipe"] = recipe_node(graph, self.recipe)
        sampled = graph.add(
            "FewStepKSampler",
            model=model,
            positive=prompt(graph, self.model),
            latent_image=latent(graph) if latent else empty_latent(graph, self.model),
            seed=SEED,
            **inputs,
        )
        return result(graph, self.comfy, self.model, sampled)

    def in_diffusers(self, **more: Any) -> Tensor:
        """FewStepPipeline."""
        return references.reference(self.model, self.recipe, seed=SEED, **more)

    def picture(self) -> Tensor:
        """Latents of a picture to start from, in the network's scale."""
        if self.model is WAN:
            return references.encoded(self.model, self.image())
        return random_latents(PICTURE_SEED, 1, *self.model.latent_shape)

    def image(self) -> Tensor:
        """The same as diffusers' image to image takes it: latents, of Wan the clip's pixels."""
        if self.model is WAN:
            return references.frames(self.model, PICTURE_SEED)
        return self.picture()

    def picture_node(self, graph: Graph) -> Node:
        """The same in ComfyUI."""
        scaled = references.latent_scale(self.model, self.picture())
        file = references.input_file(
            self.comfy.folder, f"{self.model.name}.safetensors", latent=scaled
        )
        return graph.add("FewStepTestLatent", seed=0, shape="", file=file)

    def masked_node(self, graph: Graph) -> Node:
        """The picture with its left half to be drawn anew."""
        size = {"height": self.model.pixels, "width": self.model.pixels}
        return graph.add(
            "SetLatentNoiseMask",
            samples=self.picture_node(graph),
            mask=graph.add("FewStepTestMask", **size),
        )

    def lora(self) -> Path:
        """A LoRA on every layer whose alpha is half its rank."""
        path = self.comfy.folder / "loras" / f"{self.name}.safetensors"
        return adapter_file(path, self.model, self.recipe)

    def expert_files(self) -> tuple[Path, Path]:
        """Two LoRAs on the same network that take turns."""
        high, low = (
            adapter_file(
                self.comfy.folder / "loras" / f"{self.name}-{phase}.safetensors",
                self.model,
                with_experts(self.recipe),
                seed=seed,
                metadata={"fewstep.phase": phase},
            )
            for seed, phase in enumerate((HIGH, LOW))
        )
        return high, low


def plain(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """The base alone."""
    return drawing.in_comfyui(), drawing.in_diffusers()


def lora(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """An adapter with alpha != rank."""
    file = drawing.lora()
    return drawing.in_comfyui(files=(file,)), drawing.in_diffusers(adapter=file)


def experts(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """An adapter for the noisy steps and one for the others."""
    files = drawing.expert_files()
    phased = replace(drawing, recipe=with_experts(drawing.recipe))
    by_phase = dict(zip((HIGH, LOW), files, strict=True))
    return phased.in_comfyui(files=files), phased.in_diffusers(adapter=by_phase)


def image_to_image(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """From a picture, with half of the schedule's noise."""
    ours = drawing.in_comfyui(latent=drawing.picture_node, denoise=STRENGTH)
    return ours, references.image_to_image(
        drawing.model, drawing.recipe, seed=SEED, image=drawing.image(), strength=STRENGTH
    )


def mask(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Half of a picture drawn anew."""
    ours = drawing.in_comfyui(latent=drawing.masked_node)
    return ours, references.inpainting(
        drawing.model, drawing.recipe, seed=SEED, image=drawing.picture()
    )


def batch(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Two pictures at once."""
    return (
        drawing.in_comfyui(latent=lambda graph: empty_latent(graph, drawing.model, batch=2)),
        drawing.in_diffusers(batch=2),
    )


Case = Callable[[Drawing], tuple[Tensor, Tensor]]
CASES: dict[str, Case] = {
    "no LoRA": plain,
    "LoRA": lora,
    "experts": experts,
    "image to image": image_to_image,
    "mask": mask,
    "batch of 2": batch,
}
"""Name in the table -> both sides."""


def has_stock_pipeline(model: TinyModel, case: str) -> bool:
    """Whether diffusers has a pipeline to compare with; else it is `references.in_a_loop`."""
    tasks = {"image to image": references.IMAGE_TO_IMAGE, "mask": references.INPAINTING}
    return case not in tasks or model.name in tasks[case]


def parity_error(comfy: Comfy, model: TinyModel, sampler: str, case: str) -> float:
    """Relative L2 difference of the latents of one cell."""
    name = f"{model.name}-{sampler}-{case}".replace(" ", "-")
    recipe = recipe_for(model, SAMPLERS[sampler])
    ours, expected = CASES[case](Drawing(comfy, model, recipe, name))
    return references.relative_error(ours, expected)


@cache
def recipe_for(model: TinyModel, stochasticity: float) -> FewStepRecipe:
    """Four steps; TCD ends where its authors end it, at timestep 0."""
    recipe = model.recipe(model.family, stochasticity=stochasticity)
    if model.is_flow or stochasticity in (0.0, 1.0):
        return recipe
    grid = recipe.grids[0]
    terminal = recipe.base.schedule.build().sigma_of_timestep(0.0)
    return replace(recipe, grids=(replace(grid, sigmas=(*grid.sigmas[:-1], terminal)),))


def with_experts(recipe: FewStepRecipe) -> FewStepRecipe:
    """Two steps by one expert, two by the other."""
    grid = recipe.grids[0]
    boundary = (grid.sigmas[1] + grid.sigmas[2]) / 2.0
    both = (
        Expert(adapter=HIGH, sigma_high=1.0, sigma_low=boundary),
        Expert(adapter=LOW, sigma_high=boundary, sigma_low=0.0),
    )
    return replace(recipe, experts=both, grids=(replace(grid, experts=(0, 0, 1, 1)),))


def base(graph: Graph, comfy: Comfy, model: TinyModel) -> Node:
    """The model, loaded."""
    return graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default")


def prompt(graph: Graph, model: TinyModel, seed: int = references.PROMPT_SEED) -> Node:
    """Its conditioning."""
    return graph.add("FewStepTestConditioning", seed=seed, **model.conditioning)


def empty_latent(graph: Graph, model: TinyModel, batch: int = 1) -> Node:
    """Where a picture begins."""
    kind, inputs = model.empty_latent
    return graph.add(kind, **{**inputs, "batch_size": batch})


def recipe_node(graph: Graph, recipe: FewStepRecipe) -> Node:
    """A recipe on a wire."""
    return graph.add("FewStepTestRecipe", json=recipe.to_json(), name="test")


def result(graph: Graph, comfy: Comfy, model: TinyModel, latent: Node) -> Tensor:
    """Run it; the latents in the network's scale."""
    graph.capture(latent, "latent")
    return references.network_scale(model, comfy.run(graph.prompt)["latent"]["samples"])
