"""`fewstep export check DIR`: parity and speed of an export folder on this machine."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from fewstep.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from fewstep.export.checking.findings import Findings
    from fewstep.export.checking.reference import Reference
    from fewstep.runtime.export_folder import ExportFolder

HELP = """\
Check an export folder: every checksum, kernels, overflow, parity and speed on this machine.

It is held against the pipeline it was made from (--base, --adapter) or another folder
(--against): every component on the same inputs, every step of a trajectory, the pictures, and the
time each takes; a fused graph against the folder's own components. The manifest says what was
found. One that fails is refused, with exit status 2. One that passes is "verified" if its reference
is: a pipeline, or a verified folder that is no coarser.

Examples:
  fewstep export check exported --base digits-sd3 --adapter student.safetensors
  fewstep export check exported-int8 --against exported --report report.html
  fewstep export check exported"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """Check an export folder."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder to check."""
    base: str | None = None
    """Pipeline it was made from: folder, hub id, digits-sd3 or digits-sd15."""
    adapter: str | None = None
    """The few-step LoRA it was made with."""
    recipe: Path | None = None
    """Recipe file it was made with, if not the adapter's."""
    against: Path | None = None
    """Another export folder to hold it against."""
    prompts: Path | None = None
    """Text file, one prompt per line, the first four are drawn; built-in ones if not given."""
    report: Path | None = None
    """HTML file to write, pictures side by side."""
    threads: int = 0
    """Of one network call, on both sides; 0 takes the engines' own choice."""
    rewrite: bool = False
    """Take files as they are now: write their checksums anew."""


def run(options: CheckOptions, console: Console) -> None:
    """Check, report, and write the figures into the manifest.

    Args:
        options: What the user asked for.
        console: For progress and text.

    Raises:
        FewstepError: The folder is damaged, or fails.
    """
    if options.base and options.against:
        raise ExportError("--base and --against were both given; give one")
    if (options.adapter or options.recipe) and not options.base:
        raise ExportError("--adapter and --recipe say what was done to a --base; give it too")
    from fewstep.export.checking.findings import write_figures
    from fewstep.export.checking.reference import check_not_itself
    from fewstep.runtime.export_folder import ExportFolder

    if options.against is not None:
        check_not_itself(options.folder, options.against)
    if options.rewrite:
        rewrite_sums(options.folder)
    folder = ExportFolder.open(options.folder, verify=True)
    with console.status("loading") as status, _threads(options):
        reference = _reference(options)
        found = look_at(folder, reference, options, lambda what: status.update(what))
    if reference is not None:
        write_figures(folder.root, found.entered(folder.manifest))
    show(found, console)
    if options.report is not None:
        from fewstep.export.checking.report import save_report

        save_report(options.report, found)
        console.print(f"report: {options.report}", highlight=False)
    found.require(can_be_forced=False)


def look_at(
    folder: "ExportFolder",
    reference: "Reference | None",
    options: CheckOptions,
    progress: "Callable[[str], None]",
) -> "Findings":
    """What is found, with or without something to hold the folder against."""
    from fewstep.export.checking.drawing import cases_of, draw
    from fewstep.export.checking.findings import Findings
    from fewstep.export.checking.gate import examine
    from fewstep.export.checking.inspecting import inspect
    from fewstep.export.checking.prompts import read_prompts
    from fewstep.export.checking.reference import onnx_loader

    prompts = read_prompts(options.prompts)
    if reference is not None:
        return examine(folder, reference, prompts, threads=options.threads, progress=progress)
    seen = draw(folder, onnx_loader(folder, options.threads), cases_of(folder, prompts)[0])
    problems, notes = inspect(folder, seen, progress)
    label = f"this {folder.manifest.precision} folder"
    alone = "nothing to compare with was given (--base or --against): parity was not looked at"
    return Findings(label, None, problems=problems, notes=(*notes, alone))


def _threads(options: CheckOptions) -> "AbstractContextManager[None]":
    """Holds torch, where it is the other side, to the threads that were asked for."""
    if options.base is None:
        return nullcontext()
    from fewstep.export.checking.torch_engine import torch_threads

    return torch_threads(options.threads)


def _reference(options: CheckOptions) -> "Reference | None":
    from fewstep.export.checking.reference import folder_reference, pipeline_reference

    if options.against is not None:
        return folder_reference(options.against, threads=options.threads)
    if options.base is None:
        return None
    from fewstep.cli.bases import resolve_base
    from fewstep.recipe import SIDECAR_NAME

    recipe = options.recipe
    if recipe is None and options.adapter is None:
        recipe = options.folder / SIDECAR_NAME  # the base alone need not say how it is sampled
    return pipeline_reference(resolve_base(options.base), options.adapter, recipe)


def rewrite_sums(root: Path) -> None:
    """Write the checksums of the files as they are.

    Raises:
        ExportFolderError: There is no manifest.
    """
    import dataclasses

    from fewstep.export.checking.findings import write_figures
    from fewstep.export.writing import stored_files
    from fewstep.runtime.manifest import read_manifest

    manifest = read_manifest(root)
    changed = dataclasses.replace(manifest, files=stored_files(root), measured=(), verified=False)
    write_figures(root, changed)


def show(found: "Findings", console: Console) -> None:
    """Print the figures that have limits, the speeds and the notes."""
    from rich.table import Table

    from fewstep.export.checking.limits import is_within, shown

    limited = [m for m in found.measured if m.limit is not None]
    if limited:
        table = Table(title=f"{found.label} against {found.reference}", title_justify="left")
        for heading in ("what", "where", "figure", "limit", ""):
            table.add_column(heading)
        for m in limited:
            word = "" if is_within(m) else "[red]missed[/red]"
            figure = f"{shown(m.value)} {m.unit}"
            table.add_row(m.what, m.where, figure, f"{m.limit:g}", word)
        console.print(table)
    for note in (*found.doubts, *found.notes):
        console.print(note, highlight=False, soft_wrap=True)
