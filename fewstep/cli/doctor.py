"""`fewstep doctor`: what is wrong with a pipeline, an adapter, and the way they are used."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from fewstep.cli.bases import SHIPPED, resolve_base
from fewstep.cli.output import Output, OutputOptions
from fewstep.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fewstep.doctor import Diagnosis

HELP = """\
Run a pipeline for a few steps, once as stock diffusers would and once under its recipe, and say
what its network is told and given at each step, how often it is called, whether one seed gives one
picture, how the LoRA loads, what overflows, and what to set in ComfyUI.

For a lone adapter file only its header is read, without torch. What a training run would cost, and
where it would go wrong, is `fewstep doctor train RECIPE`.

Exit status: 0 nothing that spoils pictures was found, 3 something was.

Examples:
  fewstep doctor adapter.safetensors
  fewstep doctor digits-sd3 --adapter student.safetensors
  fewstep doctor path/of/pipeline --adapter lora.safetensors --recipe lora.json --steps 4 --json
  fewstep doctor path/of/pipeline --steps 4 --guidance-scale 7.5   what a call like this does"""

FOUND = 3
"""Exit status where a finding has severity "error"."""
PROMPTS = {name: "a handwritten seven" for name in SHIPPED}


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Say what is wrong with a pipeline or an adapter, and what to do."""

    subject: Positional[str]
    """Pipeline folder, Hub id, digits-sd3, digits-sd15, or an adapter file alone."""
    adapter: str | None = None
    """The few-step LoRA to use with the pipeline: file, folder or Hub id."""
    recipe: str | None = None
    """Recipe file, or zoo:NAME, to use in place of the one in the adapter."""
    steps: int | None = None
    """Step count of the call; the recipe's default, else the pipeline's, where none is given."""
    prompt: str | None = None
    """What to draw in the probe."""
    guidance_scale: float | None = None
    """As you would pass it; the pipeline's own default where none is given."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Height and width in pixels of the probe, such as 512x768; some grids depend on it."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the networks, as you would use it."""
    device: str = "cpu"
    """Where to run the probe: cpu, cuda, cuda:1, mps."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


def run(options: Doctor, output: Output) -> None:
    """Examine, print, and leave with status 3 where something spoils pictures."""
    from fewstep.doctor.report import to_text

    diagnosis = _examined(options)
    output.result(diagnosis.to_dict(), to_text(diagnosis))
    if diagnosis.has_errors:
        sys.exit(FOUND)


def _examined(options: Doctor) -> "Diagnosis":
    if _is_adapter(options.subject):
        if options.adapter is not None:
            raise ConfigError(
                f"{options.subject} is an adapter, and so is --adapter; name the pipeline first"
            )
        from fewstep.doctor import examine_adapter

        return examine_adapter(options.subject, recipe=options.recipe, steps=options.steps)
    from fewstep.doctor import examine

    arguments = _arguments(options)
    return examine(
        _load(options),
        recipe=options.recipe,
        adapter=options.adapter,
        steps=options.steps,
        arguments=arguments,
    )


def _load(options: Doctor) -> "DiffusionPipeline":
    import torch

    from fewstep.loading import load_stock_pipeline

    precisions = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    try:
        pipe = load_stock_pipeline(
            resolve_base(options.subject), dtype=precisions[options.precision]
        )
    except (OSError, ValueError) as error:  # ValueError: not even the form of a Hub id
        reason = str(error).partition(". ")[0].rstrip(".")
        raise PipelineError(
            f"could not load {options.subject!r}; give a pipeline folder, a Hub id that can be "
            f"reached, digits-sd3, digits-sd15 or an adapter file ({reason})"
        ) from error
    try:
        return pipe.to(options.device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # by kind of device
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {options.device} cannot be used here ({reason})") from error


def _is_adapter(subject: str) -> bool:
    """A file, or a folder that holds weights but no pipeline."""
    path = Path(subject).expanduser()
    if subject in SHIPPED and not path.exists():
        return False
    if path.is_dir():
        return not (path / "model_index.json").exists() and any(path.glob("*.safetensors"))
    return path.is_file() or path.suffix == ".safetensors"


def _arguments(options: Doctor) -> dict[str, Any]:
    prompt = options.prompt or PROMPTS.get(options.subject, "a photograph of a lighthouse")
    arguments: dict[str, Any] = {"prompt": prompt}
    if options.guidance_scale is not None:
        arguments["guidance_scale"] = options.guidance_scale
    if options.size is not None:
        arguments["height"], arguments["width"] = _sides(options.size)
    return arguments


def _sides(size: str) -> tuple[int, int]:
    sides = size.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size must be HEIGHTxWIDTH such as 512x768, got {size}")
    return int(sides[0]), int(sides[1])
