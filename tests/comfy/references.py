"""What FewStepPipeline draws with a tiny model: the latents ComfyUI must give too.

Where diffusers has no pipeline of a task, `in_a_loop` has the recipe's scheduler step the stock
network as the pipelines of that task do. Latents are in the network's scale here; ComfyUI's LATENT
has another, see `network_scale`.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.image_to_image import begin
from fewstep.recipe import FewStepRecipe
from fewstep.schedulers import FewStepScheduler
from fewstep.start_rules import DEFAULT_START_RULE
from tests.comfy.testkit import conditioning, left_half
from tests.comfy.tiny_models import TinyModel, built
from tests.tiny.parts import stock

PROMPT_SEED = 11
"""Of the conditioning on both sides."""

IMAGE_TO_IMAGE = {
    "sd3": stock.StableDiffusion3Img2ImgPipeline,
    "sd15": stock.StableDiffusionImg2ImgPipeline,
    "sdxl": stock.StableDiffusionXLImg2ImgPipeline,
    "wan": stock.WanVideoToVideoPipeline,
}
INPAINTING = {
    "sd3": stock.StableDiffusion3InpaintPipeline,
    "sd15": stock.StableDiffusionInpaintPipeline,
    "sdxl": stock.StableDiffusionXLInpaintPipeline,
}
Ask = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(stock network, sample, timestep of each sample, prompt) -> its output, without a variance."""

NETWORK_CALLS: dict[str, Ask] = {
    "sd3": lambda network, sample, timestep, made: network(
        hidden_states=sample,
        timestep=timestep,
        encoder_hidden_states=made["cond"],
        pooled_projections=made["pooled"],
        return_dict=False,
    )[0],
    "sd15": lambda network, sample, timestep, made: network(
        sample, timestep, encoder_hidden_states=made["cond"], return_dict=False
    )[0],
    "wan": lambda network, sample, timestep, made: network(
        hidden_states=sample,
        timestep=timestep,
        encoder_hidden_states=made["cond"],
        return_dict=False,
    )[0],
    "pixart": lambda network, sample, timestep, made: network(
        sample,
        encoder_hidden_states=made["cond"],
        encoder_attention_mask=torch.ones(made["cond"].shape[:2]),
        timestep=timestep,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0].chunk(2, dim=1)[0],
}
"""Model -> how its stock pipeline asks the network; SDXL has a pipeline for every task."""

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
    """The same from a picture.

    Args:
        model: Which model.
        recipe: How it is sampled.
        seed: Of the noise.
        image: Latents; for Wan, whose pipeline takes no clean latents, `frames`.
        strength: 0 to 1.
    """
    if model.name not in IMAGE_TO_IMAGE:
        return in_a_loop(model, recipe, seed=seed, image=image, strength=strength)
    task = IMAGE_TO_IMAGE[model.name]
    picture: dict[str, Any] = {"video" if model.name == "wan" else "image": image}
    return reference(model, recipe, seed=seed, task=task, strength=strength, **picture)


def inpainting(model: TinyModel, recipe: FewStepRecipe, *, seed: int, image: Tensor) -> Tensor:
    """The same where only the left half of a picture's latents is made anew."""
    if model.name not in INPAINTING:
        mask = left_half(*model.latent_shape[-2:])
        return in_a_loop(model, recipe, seed=seed, image=image, mask=mask)
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


@torch.no_grad()
def in_a_loop(
    model: TinyModel,
    recipe: FewStepRecipe,
    *,
    seed: int,
    image: Tensor,
    strength: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """What a stock inpainting pipeline would draw, written out: begin, step, blend.

    As in StableDiffusion3InpaintPipeline it begins with noise alone at strength 1, else with the
    noised picture, and after every step what is kept is the picture at the next step's noise.

    Args:
        model: Which model.
        recipe: How it is sampled; without guidance.
        seed: Of the noise, the first and the fresh.
        image: A picture's latents, (1, *model.latent_shape).
        strength: 0 to 1.
        mask: 1 where the picture is made, 0 where it is kept; None makes all of it.
    """
    made = conditioning(PROMPT_SEED, **model.conditioning)
    drawn = torch.ones(()) if mask is None else mask
    scheduler = FewStepScheduler(recipe)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator)
    timesteps = begin(scheduler, strength, DEFAULT_START_RULE)
    noised = [scheduler.add_noise(image, noise, timestep) for timestep in timesteps]
    sample = scheduler.init_noise_sigma * noise if strength == 1.0 else noised[0]
    with scheduler.bound(generator):
        for timestep, kept in zip(timesteps, [*noised[1:], image], strict=True):
            output = NETWORK_CALLS[model.name](built(model), sample, timestep.expand(1), made)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
            sample = drawn * sample + (1.0 - drawn) * kept
    return sample


def frames(model: TinyModel, seed: int) -> Tensor:
    """Pixels of a clip of one frame, 0 to 1, (1, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, 3, model.pixels, model.pixels), generator=generator)


@torch.no_grad()
def encoded(model: TinyModel, video: Tensor) -> Tensor:
    """A clip's latents by Wan's VAE, as its video-to-video pipeline makes them.

    Args:
        model: Wan.
        video: Pixels, 0 to 1, (frames, 3, height, width).
    """
    vae: Any = model.pipeline().components["vae"]
    found = vae.encode((2.0 * video - 1.0).transpose(0, 1)[None]).latent_dist.mode()
    mean, deviation = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (found - mean) * (1.0 / deviation)


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
