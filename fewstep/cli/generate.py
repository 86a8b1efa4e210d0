"""`fewstep generate`: draw pictures with a base and a few-step adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from fewstep import __version__
from fewstep.cli.bases import resolve_base
from fewstep.cli.output import Output, OutputOptions
from fewstep.cli.picture_folder import PictureFolder, check_request
from fewstep.errors import ConfigError, PipelineError
from fewstep.noise import image_seeds

if TYPE_CHECKING:
    from PIL.Image import Image

    from fewstep.pipeline import FewStepPipeline

HELP = """\
Draw pictures with a base pipeline and a few-step adapter. Step counts, sigmas, guidance and noise
come from the recipe in the adapter file. Picture i is drawn from seed + i, whatever its batch.

Every PNG carries the prompt, the seed and the recipe in its text metadata.

Examples:
  fewstep generate --base digits-sd3 --adapter student.safetensors --prompt "a handwritten seven"
  fewstep generate --base digits-sd3 --adapter student.safetensors \\
      --prompt "a handwritten one" "a handwritten two" --num-images 4 --steps 2 --seed 7
  fewstep generate --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --adapter lcm.safetensors --recipe lcm.json --prompt "a lighthouse" --size 512x768"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Draw pictures with a base and a few-step adapter; PNGs carry prompt, seed and recipe."""

    base: str
    """Pipeline folder, Hub id, digits-sd3 or digits-sd15."""
    prompt: tuple[str, ...]
    """What to draw; several prompts may follow each other."""
    adapter: str | None = None
    """The few-step LoRA: file, folder or Hub id; none if the base is few-step already."""
    recipe: Path | None = None
    """Recipe file to use in place of the one in the adapter."""
    steps: int | None = None
    """Step count; the recipe's own default where none is given."""
    seed: int = 0
    """Seed of the first picture; the next has seed + 1."""
    num_images: int = 1
    """Pictures of each prompt."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Height and width in pixels, such as 512x768; the pipeline's own where none is given."""
    batch_size: int = 4
    """Pictures drawn at once; changes memory and speed, not the pictures."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first GPU there is."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the networks."""
    out: Path = Path("pictures")
    """Folder for the PNG files; made if missing, nothing in it is overwritten."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()

    def __post_init__(self) -> None:
        check_request(self.num_images, self.batch_size, self.seed, self.size)


def run(options: Generate, output: Output) -> None:
    """Load, draw, save, and print what was used."""
    pipeline = _load(options, is_silent=output.is_silent)
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    seeds = image_seeds(options.seed, len(prompts))
    used = {
        "base": options.base,
        "adapter": options.adapter,
        "steps": pipeline.recipe.grid(options.steps).num_steps,
        "nfe": pipeline.recipe.nfe(options.steps),
        "guidance_scale": pipeline.recipe.guidance.scale,
        "stochasticity": pipeline.recipe.sampler.stochasticity,
        "precision": options.precision,
        "fewstep": __version__,
    }
    pictures = PictureFolder(options.out, pipeline.recipe.to_json())
    for start in range(0, len(prompts), options.batch_size):
        batch = slice(start, start + options.batch_size)
        images = _draw(pipeline, prompts[batch], seeds[batch], options.size)
        for prompt, seed, image in zip(prompts[batch], seeds[batch], images, strict=True):
            pictures.save(image, {"prompt": prompt, "seed": seed, **used})
    text = "\n".join([pipeline.describe(), "", *pictures.names])
    output.result({**used, "pictures": pictures.saved}, text)


def _load(options: Generate, *, is_silent: bool) -> "FewStepPipeline":
    """The pipeline, on its device."""
    import torch

    from fewstep.pipeline import FewStepPipeline

    precisions = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    device = pick_device(options.device)
    base = resolve_base(options.base)
    try:
        pipeline = FewStepPipeline.from_pretrained(
            base,
            adapter=options.adapter,
            recipe=options.recipe,
            steps=options.steps,
            dtype=precisions[options.precision],
        )
    except OSError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise PipelineError(
            f"could not load the base {base!r}; --base takes a pipeline folder, a Hub id that can "
            f"be reached, digits-sd3 or digits-sd15 ({reason})"
        ) from error
    pipeline.set_progress_bar_config(disable=is_silent)
    pipeline.to(device)
    return pipeline


def pick_device(name: str) -> str:
    """A device of this machine; `auto` is the best there is.

    Raises:
        ConfigError: torch does not know the name, or cannot use the device here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # by kind of device
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name} cannot be used here ({reason}); try auto") from error
    return name


def _draw(
    pipeline: "FewStepPipeline", prompts: Sequence[str], seeds: Sequence[int], size: str | None
) -> "list[Image]":
    """One batch of pictures."""
    if size is None:
        return pipeline(prompt=list(prompts), seed=seeds).images
    height, width = (int(side) for side in size.split("x"))
    try:
        return pipeline(prompt=list(prompts), seed=seeds, height=height, width=width).images
    except ValueError as error:  # diffusers knows which sizes a pipeline can draw
        raise ConfigError(f"--size {size} was refused: {error}") from error
