"""What FewStepPipeline draws with a tiny model: the latents ComfyUI must give too.

Latents are in the network's scale here; ComfyUI's LATENT has another, see `network_scale`.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe
from tests.comfy.testkit import conditioning, left_half
from tests.comfy.tiny_models import TinyModel
from tests.tiny.parts import stock

PROMPT_SEED = 11
"""Of the conditioning on both sides."""

IMAGE_TO_IMAGE = {
    "sd3": stock.StableDiffusion3Img2ImgPipeline,
    "sd15": stock.StableDiffusionImg2ImgPipeline,
    "sdxl": stock.StableDiffusionXLImg2ImgPipeline,
}
INPAINTING = {
    "sd3": stock.StableDiffusion3InpaintPipeline,
    "sd15": stock.StableDiffusionInpaintPipeline,
    "sdxl": stock.StableDiffusionXLInpaintPipeline,
}
FLAGS = {
    "requires_safety_checker": False,
    "requires_aesthetics_score": False,
    "force_zeros_for_empty_prompt": True,
}


def reference(
    model: TinyModel,
    recipe: FewStepRecipe,
    *,
    seed: int,
    adapter: Any = None,
    batch: int = 1,
    one_stream: bool = False,
    task: type[Any] | None = None,
    **more: Any,
) -> Tensor:
    """FewStepPipeline's latents, (batch, *model.latent_shape).

    Args:
        model: Which model.
        recipe: How it is sampled.
        seed: Of the first picture's noise.
        adapter: LoRA file, or files of experts, as FewStepPipeline takes them.
        batch: Pictures; each has a seed of its own.
        one_stream: The batch is drawn from one generator, as ComfyUI's own nodes do.
        task: Another stock pipeline class around the same network.
        **more: For the call.
    """
    pipe = model.pipeline() if task is None else as_task(model.pipeline(), task)
    wrapped = FewStepPipeline.wrap(pipe, recipe=recipe, adapter=adapter)
    made = conditioning(PROMPT_SEED, **model.conditioning)
    noise = {"generator": torch.Generator().manual_seed(seed)} if one_stream else {"seed": seed}
    given = {
        **model.call({name: torch.cat([value] * batch) for name, value in made.items()}),
        **more,
        **noise,
    }
    taken = inspect.signature(type(wrapped).__call__).parameters
    drawn = wrapped(**{name: value for name, value in given.items() if name in taken})[0]
    return drawn.reshape(batch, *model.latent_shape)


def image_to_image(
    model: TinyModel, recipe: FewStepRecipe, *, seed: int, image: Tensor, strength: float
) -> Tensor:
    """The same from a picture's latents."""
    task = IMAGE_TO_IMAGE[model.name]
    return reference(model, recipe, seed=seed, task=task, image=image, strength=strength)


def inpainting(model: TinyModel, recipe: FewStepRecipe, *, seed: int, image: Tensor) -> Tensor:
    """The same where only the left half of a picture's latents is made anew."""
    return reference(
        model,
        recipe,
        seed=seed,
        task=INPAINTING[model.name],
        image=image,
        mask_image=left_half(model.pixels, model.pixels)[None],
        masked_image_latents=image,  # only looked at by networks made for inpainting
        strength=1.0,
    )


def as_task(pipe: Any, task: type[Any]) -> Any:
    """A stock pipeline of another task around the same components."""
    wanted = inspect.signature(task.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    missing = {name: None for name in wanted if name not in parts and name != "self"}
    flags = {name: value for name, value in FLAGS.items() if name in missing}
    other = task(**{**parts, **missing, **flags})
    other.set_progress_bar_config(disable=True)
    return other


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 of the difference, relative to the L2 of what was expected."""
    difference = torch.linalg.vector_norm((actual - expected).double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def network_scale(model: TinyModel, latents: Tensor) -> Tensor:
    """A LATENT's samples in the scale the network works in (ComfyUI must be booted)."""
    return _format_of(model).process_in(latents)


def latent_scale(model: TinyModel, latents: Tensor) -> Tensor:
    """The way back: what a LATENT holds for latents in the network's scale."""
    return _format_of(model).process_out(latents)


def _format_of(model: TinyModel) -> Any:
    import comfy.latent_formats as formats  # pyright: ignore[reportMissingImports]

    return vars(formats)[model.latent_format]()


def input_file(folder: Path, name: str, **tensors: Tensor) -> str:
    """Put tensors where the test kit's nodes find them.

    Returns:
        The name for their `file` input.
    """
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "input" / name)
    return name
