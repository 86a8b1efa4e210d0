"""`fewstep inspect`: what an adapter file says about itself. Reads headers only; no torch."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from fewstep.cli.bases import resolve_base
from fewstep.cli.output import Output, OutputOptions

HELP = """\
Say what is in a LoRA file: its recipe, ranks, alphas, the base family it was made for, and how
much of the base it covers. Reads the header only, so it takes no time and needs no torch.

Examples:
  fewstep inspect adapter.safetensors
  fewstep inspect adapter.safetensors --json
  fewstep inspect adapter.safetensors --base digits-sd3   also check it against a base"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Say what is in an adapter file: recipe, ranks, alphas, base family, coverage."""

    file: Positional[Path]
    """The .safetensors file."""
    base: str | None = None
    """Pipeline folder (or digits-sd3, digits-sd15) to check the adapter against."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


def run(options: Inspect, output: Output) -> None:
    """Read the file and print the report."""
    from fewstep.adapters import inspect_adapter

    base = None if options.base is None else Path(resolve_base(options.base))
    report = inspect_adapter(options.file, base)
    output.result(report.to_dict(), report.to_text())
