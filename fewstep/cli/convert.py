"""`fewstep convert`: an adapter file in another program's names."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from fewstep.cli.bases import resolve_base
from fewstep.cli.output import Output, OutputOptions
from fewstep.errors import ConfigError

if TYPE_CHECKING:
    from fewstep.adapters.conversion.convert import Conversion

HELP = """\
Write a LoRA file again in the names another program reads: diffusers, ComfyUI or kohya's tools.
Values stay as they are, the recipe goes along, and nothing is written if a layer would be lost.

With --rank it also makes smaller LoRAs, and LoRAs out of full weights or whole deltas, and says
what that costs: the relative error of every changed layer and of all of them together.

Examples:
  fewstep convert student.safetensors student-comfyui.safetensors --format comfyui
  fewstep convert kohya.safetensors lora.safetensors --format diffusers --base path/to/sdxl
  fewstep convert lora.safetensors baked.safetensors --format diffusers --bake-alpha
  fewstep convert Hyper-FLUX.1-dev-8steps-lora.safetensors hyper.safetensors --format comfyui \
      --recipe zoo:hyper-flux1-dev-8steps-lora --bake-scale
  fewstep convert big.safetensors small.safetensors --format diffusers --rank 32
  fewstep convert full-student/ lora.safetensors --format diffusers --base teacher/ --rank 64

--base is the folder of the model the adapter is for. With it every name and every shape is
checked; without it the file's own word is taken. A full-weight student always needs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Write an adapter in another program's names, smaller, or from full weights."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="IN")]
    """The adapter (.safetensors, or a pickle of plain tensors), or a full-weight student."""
    target: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The new .safetensors file."""
    format: Literal["diffusers", "comfyui", "kohya"]
    """Whose names to write."""
    base: str | None = None
    """Folder of the base model (or digits-sd3, digits-sd15), to check against."""
    family: str | None = None
    """Base family such as sdxl or wan, where the names do not tell."""
    bake_alpha: bool = False
    """Multiply alpha / rank into the weights, for readers that know no alpha."""
    bake_scale: bool = False
    """Multiply the recipe's LoRA scale into the weights, so that strength 1 is right everywhere."""
    recipe: str | None = None
    """Recipe to write into the file: a JSON file, or zoo:NAME (fewstep zoo search)."""
    rank: int | None = None
    """Highest rank of the denoiser's layers; the error this costs is reported."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


def run(options: Convert, output: Output) -> None:
    """Convert, and say what was written."""
    from fewstep.adapters.conversion.convert import convert_file
    from fewstep.recipe_resolution import read_recipe

    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank is {options.rank}, wanted at least 1; 16 to 128 is usual")
    base = None if options.base is None else Path(resolve_base(options.base))
    convert = partial(
        convert_file,
        options.source,
        options.target,
        options.format,
        base=base,
        family=options.family,
        rank=options.rank,
        recipe=None if options.recipe is None else read_recipe(options.recipe),
        is_baked=options.bake_alpha,
        is_scale_baked=options.bake_scale,
    )
    if options.rank is None:  # renaming takes no time worth a bar
        conversion = convert()
    else:
        with output.progress() as bars:
            bar = bars.add_task("layers", total=None)
            conversion = convert(
                progress=lambda done, total: bars.update(bar, completed=done, total=total)
            )
    output.result(conversion.to_dict(), _text(conversion))


def _text(conversion: "Conversion") -> str:
    from fewstep.adapters.conversion.ranking import total_error

    rows = [
        ("file", str(conversion.path)),
        ("format", conversion.flavour),
        ("family", conversion.family),
        ("modules", str(conversion.modules)),
    ]
    if conversion.text_modules:
        rows.append(("", f"{conversion.text_modules} in text encoders"))
    if conversion.deltas:
        rows.append(("deltas", f"{conversion.deltas} parameters changed by whole deltas"))
    checked = "every layer fits the base" if conversion.is_checked else "no base given: not checked"
    rows.append(("checked", checked))
    if conversion.errors:
        worst = max(conversion.errors, key=lambda error: error.relative)
        rows.append(("error", f"{total_error(conversion.errors):.3g} of the adapter's size"))
        rows.append(("worst", f"{worst.module}: {worst.relative:.3g} at rank {worst.rank}"))
    if conversion.left_out:
        name, change = max(conversion.left_out.items(), key=lambda item: item[1])
        count = len(conversion.left_out)
        text = f"{count} vectors that this format cannot change, most {name} ({change:.3g} of it)"
        rows.append(("left out", text))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)
