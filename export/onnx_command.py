"""`python -m fewstep.export onnx`: a pipeline becomes a folder."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fewstep.errors import ExportError
from fewstep.runtime.manifest import Manifest

if TYPE_CHECKING:
    from fewstep.export.merging import MergedPipeline

Precision = Literal["fp32", "fp16", "int8-dynamic", "int8-static", "int4", "fp8", "int8-modelopt"]
TRACED = ("fp32", "fp16")
"""Precisions of the networks themselves; graphs of the others are made from fp32 graphs."""

HELP = """\
Export a few-step pipeline to ONNX: one folder that any machine can draw from, without torch.

The adapter is merged into the base (and the merge is checked), every component becomes a graph with
free batch, height, width and sequence, and tokenizers, scheduler and recipe go beside them. The
folder has the layout of Optimum's ORTDiffusionPipeline; fewstep.runtime draws by the recipe. An
adapter with phase experts (a folder, a file for each) gives one denoiser per expert.

Before the folder is put in its place, every graph is compared with the network it was made from,
and the folder's pictures and speed with the pipeline's; what differs or is slower is not published.
For int8-dynamic and the like this is done with an fp32 folder beside --out, which is gone
afterwards, and the folder in fewer bits is held against it.

Examples:
  fewstep export onnx --base digits-sd3 --adapter student.safetensors --out exported
  fewstep export onnx --base my-sdxl/ --adapter lightning.safetensors --precision fp16 --out sdxl
  fewstep export onnx --base digits-sd3 --adapter student.safetensors --fused --out exported
  fewstep export onnx --base my-sdxl/ --adapter lightning.safetensors --precision int4 --out sdxl"""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxOptions:
    """Export a pipeline to ONNX graphs."""

    base: str
    """Pipeline folder, hub id, digits-sd3 or digits-sd15."""
    out: Path
    """Folder to write; appears when everything in it is whole."""
    adapter: str | None = None
    """The few-step LoRA, or a folder with one per expert; none if the base is few-step already."""
    recipe: Path | None = None
    """Recipe file to use in place of the adapter's."""
    precision: Precision = "fp32"
    """Of the graphs. Of the denoiser alone, beyond fp32 and fp16: an fp32 folder is made first, and
    `quantize` writes it in fewer bits; `quantize` itself has more settings, and nvfp4."""
    opset: int = 18
    """18 to 23. 18 suits ONNX Runtime; 23 has attention as one operator, for TensorRT and CUDA."""
    fused: bool = False
    """Also write the whole pipeline as one graph: token ids and noise in, picture out."""
    fused_steps: int | None = None
    """Step count of the fused graph; the recipe's own where none is given."""
    prompts: Path | None = None
    """Text file, one prompt per line, of the pictures that are compared; eight are built in, and
    one line makes the check of a large model on a processor far shorter."""
    report: Path | None = None
    """HTML page with pictures side by side, differences and speed; not inside --out."""
    overwrite: bool = False
    """Replace what is in --out."""
    force: bool = False
    """Publish even if it differs from the pipeline more than it should, or is slower."""


def check_pictures(
    merged: "MergedPipeline",
    folder: Path,
    manifest: Manifest,
    options: OnnxOptions,
    progress: Callable[[str], None],
) -> Manifest:
    """The pipeline's own pictures and speed beside the folder's, where the runtime drives it.

    Raises:
        ExportError: The folder differs from its pipeline or is slower, and --force is not given.
    """
    from fewstep.export.checking.gate import examine
    from fewstep.export.checking.prompts import read_prompts
    from fewstep.export.checking.reference import merged_reference
    from fewstep.export.checking.report import save_report
    from fewstep.export.onnx_folder import write_manifest
    from fewstep.runtime.export_folder import ExportFolder
    from fewstep.runtime.hosts.registry import HOSTS

    if manifest.family not in {host.family for host in HOSTS}:
        return manifest  # `run` says so
    write_manifest(folder, manifest)
    prompts = read_prompts(options.prompts)
    found = examine(ExportFolder.open(folder), merged_reference(merged), prompts, progress=progress)
    if options.report is not None:
        save_report(options.report, found)
    found.require(force=options.force)
    return dataclasses.replace(
        manifest,
        measured=(*manifest.measured, *found.measured),
        verified=manifest.verified and found.is_good,
    )


def run(options: OnnxOptions, console: Console) -> None:
    """Export, check, publish."""
    from fewstep.export.checking.prompts import read_prompts
    from fewstep.export.writing import check_target, whole_folder

    check_options(options)
    check_target(options.out, overwrite=options.overwrite)
    read_prompts(options.prompts)  # a wrong file is refused now, not after the export
    if options.precision not in TRACED:
        from fewstep.export.onnx_in_fewer_bits import run_quantized

        return run_quantized(options, console)
    with progress_on(console) as tell:
        merged = load(options)
        with whole_folder(options.out, overwrite=options.overwrite) as folder:
            manifest = export_into(folder, merged, options, tell)
    console.print(f"wrote {options.out}: {', '.join(manifest.graphs)}", highlight=False)
    if not any(measured.what == "image" for measured in manifest.measured):
        console.print(
            f"no host of ours draws {manifest.family}: graphs were compared with their networks, "
            "pictures and speed with nothing",
            highlight=False,
        )


def check_options(options: OnnxOptions) -> None:
    """Refuse settings that cannot be served, before anything is loaded.

    Raises:
        ExportError: With what to give in their place.
    """
    if options.fused_steps is not None and not options.fused:
        raise ExportError(
            f"--fused-steps is {options.fused_steps}, and no fused graph was asked for; add --fused"
        )
    from fewstep.export.onnx_folder import check_opset
    from fewstep.export.writing import check_report

    check_report(options.report, options.out)
    check_opset(options.opset)


@contextmanager
def progress_on(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda what: progress.update(task, description=what)


def load(options: OnnxOptions) -> "MergedPipeline":
    """The pipeline, seen to be one that can be exported as asked.

    Raises:
        FewstepError: It cannot be loaded, or has no fused graph and one was asked for.
    """
    from fewstep.cli.bases import resolve_base
    from fewstep.export.fused.fusing import check_can_be_fused
    from fewstep.export.merging import load_merged

    assert options.precision in TRACED
    base = resolve_base(options.base)
    merged = load_merged(base, options.adapter, options.recipe, options.precision)
    if options.fused:
        check_can_be_fused(type(merged.pipe).__name__, merged.recipe, options.fused_steps)
    return merged


def export_into(
    folder: Path, merged: "MergedPipeline", options: OnnxOptions, tell: Callable[[str], None]
) -> Manifest:
    """Write and check everything of an export folder.

    Raises:
        ExportError: It cannot be exported, or differs from its pipeline more than it should.
    """
    from fewstep.export.gate import check_graphs
    from fewstep.export.onnx_folder import write_folder, write_manifest

    manifest = write_folder(merged, folder, opset=options.opset, progress=tell)
    manifest = check_graphs(merged, folder, manifest, force=options.force, progress=tell)
    if options.fused:
        from fewstep.export.fused.fusing import add_fused
        from fewstep.export.fused.verifying import verify_fused

        tell("fused graph")
        manifest = add_fused(folder, manifest, merged.recipe, options.fused_steps)
        manifest = verify_fused(folder, write_manifest(folder, manifest))
    manifest = check_pictures(merged, folder, manifest, options, tell)
    return write_manifest(folder, manifest)
