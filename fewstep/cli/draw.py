"""`fewstep draw`: pictures and clips from an export folder, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from fewstep import __version__
from fewstep.cli.output import Output, OutputOptions
from fewstep.cli.picture_folder import PictureFolder, check_out, check_request, read_size
from fewstep.noise import image_seeds

HELP = """\
Draw pictures from a folder that `fewstep export onnx` made, with ONNX Runtime (or OpenVINO, CUDA,
TensorRT): the pictures of `fewstep generate` for the same seeds, without torch or diffusers.

Examples:
  fewstep draw exported/ --prompt "a handwritten seven" --seed 7
  fewstep draw exported/ --prompt "a handwritten one" "a handwritten two" --num-images 4 --steps 2
  fewstep draw exported/ --prompt "a lighthouse" --size 512x768 --provider openvino
  fewstep draw exported-wan/ --prompt "a lighthouse in a storm" --size 480x832 --frames 33"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Draw from an export folder, without torch."""

    folder: tyro.conf.Positional[Path]
    """What `fewstep export onnx --out` made."""
    prompt: tuple[str, ...]
    """What to draw; several prompts may follow each other."""
    steps: int | None = None
    """Step count; the recipe's own default where none is given."""
    seed: int = 0
    """Seed of the first picture; the next has seed + 1."""
    num_images: int = 1
    """Pictures of each prompt."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Height and width in pixels, such as 512x768; the model's own where none is given."""
    frames: int | None = None
    """Pictures of each clip, for models that make clips; the model's own where none is given."""
    batch_size: int = 4
    """Pictures drawn at once; changes memory and speed, not the pictures."""
    provider: str = "auto"
    """cpu, openvino, cuda, tensorrt, coreml, directml; auto measures once per model and machine.
    openvino-bf16 is quicker on processors with AMX, and draws nearly the same picture."""
    threads: int = 0
    """Processor threads; 0 takes the engine's choice."""
    verify: bool = False
    """Compare every file with its checksum first."""
    out: Path = Path("pictures")
    """Folder for the PNG files, or the animated WebP files of clips; made if missing, nothing in it
    is overwritten."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()

    def __post_init__(self) -> None:
        check_request(self.num_images, self.batch_size, self.seed, self.size)


def run(options: Draw, output: Output) -> None:
    """Load, draw, save, and print what was used."""
    from fewstep.runtime.few_step_runtime import FewStepRuntime

    check_out(options.out)
    runtime = FewStepRuntime.load(
        options.folder, provider=options.provider, threads=options.threads, verify=options.verify
    )
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    seeds = image_seeds(options.seed, len(prompts))
    used = {
        "folder": str(options.folder),
        "provider": runtime.provider,
        "steps": runtime.recipe.grid(options.steps).num_steps,
        "nfe": runtime.recipe.nfe(options.steps),
        "precision": runtime.folder.manifest.precision,
        "fewstep": __version__,
    }
    pictures = PictureFolder(options.out, runtime.recipe.to_json())
    with output.progress() as progress:
        task = progress.add_task("drawing", total=len(prompts))
        for start in range(0, len(prompts), options.batch_size):
            batch = slice(start, start + options.batch_size)
            found = runtime(
                prompts[batch],
                seed=seeds[batch],
                steps=options.steps,
                size=None if options.size is None else read_size(options.size),
                frames=options.frames,
            )
            for prompt, seed, drawn in zip(prompts[batch], seeds[batch], found.frames, strict=True):
                facts = {"prompt": prompt, "seed": seed, **used}
                if found.frames_per_second is None:
                    pictures.save(drawn[0], facts)
                else:
                    pictures.save_clip(drawn, found.frames_per_second, facts)
                progress.advance(task)
    output.result({**used, "pictures": pictures.saved}, "\n".join(pictures.names))
