"""`fewstep inspect`: what an adapter file says of itself, and whether it can be used. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from fewstep.cli.bases import resolve_base
from fewstep.cli.output import Output, OutputOptions
from fewstep.errors import AdapterError

HELP = """\
Say what is in a LoRA file: its recipe, ranks, alphas, the base family it was made for, the phase
expert it is, and how much of a base it covers; of a file without a recipe, what the zoo knows.
Reads the header only, so it takes no time and needs no torch; with --values every number is looked
at too. Pickles (.pt, .bin, .ckpt) are read as data, never run. Exit status 2 if the file is
unusable or does not fit the base.

Examples:
  fewstep inspect adapter.safetensors
  fewstep inspect adapter.safetensors --json
  fewstep inspect adapter.safetensors --base digits-sd3   also check it against a base
  fewstep inspect adapter.pt --values                     also look for NaN and infinity"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Say what is in an adapter file: recipe, ranks, alphas, base family, coverage."""

    file: Positional[Path]
    """The .safetensors file, or a pickle of plain tensors."""
    base: str | None = None
    """Pipeline folder (or digits-sd3, digits-sd15) to check the adapter against."""
    values: bool = False
    """Look at every number for NaN and infinity; reads the whole file."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


def run(options: Inspect, output: Output) -> None:
    """Read the file and print the report.

    Raises:
        AdapterError: The file is unusable; the report was printed before.
    """
    from fewstep.adapters import inspect_adapter
    from fewstep.adapters.opening import open_adapter
    from fewstep.cli.zoo import of_header

    base = None if options.base is None else Path(resolve_base(options.base))
    report = inspect_adapter(options.file, base, values=options.values)
    known = of_header(open_adapter(options.file)) if report.recipe is None else None
    text = report.to_text()
    if known is not None and (line := _zoo_line(known)):
        text += f"\n{line}"
    output.result({**report.to_dict(), "zoo": known}, text)
    if report.errors:
        raise AdapterError(report.errors[0])


def _zoo_line(known: dict[str, Any]) -> str | None:
    """What the zoo says of a file without a recipe; None if it does not know it."""
    if name := known["entry"]:
        return f"zoo       zoo:{name} (by {known['found_by']}); see: fewstep zoo show {name}"
    if similar := known["similar"]:
        names = " or ".join(f"zoo:{name}" for name in similar)
        return f"zoo       looks like {names}; see: fewstep zoo show {similar[0]}"
    return None
