"""`fewstep export quantize DIR --out DIR2 --precision int8-dynamic`: fewer bits, if it pays."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from fewstep.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fewstep.export.quantizing.plan import Plan, Result
    from fewstep.export.quantizing.schemes import Scheme
    from fewstep.runtime.export_folder import ExportFolder
    from fewstep.runtime.manifest import Manifest

Wanted = Literal["int8-dynamic", "int8-static", "int4", "fp8", "int8-modelopt", "nvfp4"]

HELP = """\
Write the networks of an export folder in fewer bits, and publish the result if it pays.

The new folder is held against the old one before it appears: pictures, latents and the time each
network takes on this machine. One that differs too much, or is slower, is refused; --force
publishes it all the same, and its manifest says so.

--skip takes regular expressions over parameter names (first and last layers always stay float),
auto:K (the K most sensitive layers), budget:E (skip the most sensitive until the rest costs less
than E, relative), or none (not even first and last layers are skipped). To find the most sensitive,
up to 48 layers are measured one by one; of more, groups are measured and the worst are divided
until their layers are known, with at most 144 measurements where K layers can be known by then.

nvfp4 is for TensorRT 10.14 or newer on Blackwell GPUs (sm_100, sm_120) and runs nowhere else. Its
pictures are checked with the same numbers in float; no engine was built from it, no time is
measured, and its manifest says "verified": false.

Examples:
  fewstep export quantize exported --out exported-int8 --precision int8-dynamic
  fewstep export quantize exported --out exported-u16 --precision int8-static --activations uint16
  fewstep export quantize exported --out exported-int4 --precision int4 --skip auto:4
  fewstep export quantize exported --out exported-int4 --precision int4 --distil 200 \\
      --base digits-sd3 --adapter student.safetensors"""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Write an export folder in fewer bits."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """An fp32 folder of `fewstep export onnx`."""
    out: Path
    """Folder to write; appears when everything in it is whole and was checked."""
    precision: Wanted
    """int8-dynamic: products in 8 bits, nothing to calibrate. int8-static: ranges from the
    student's own trajectories. int4: weights in 4 bits. fp8, int8-modelopt, nvfp4: by
    nvidia-modelopt, for TensorRT; nvfp4 needs a Blackwell GPU."""
    activations: Literal["uint8", "uint16", "int8"] = "uint8"
    """Of int8-static. uint16: exact enough, but products are made in float. int8: for TensorRT."""
    block: int = 32
    """Weights per scale of int4: 16, 32, 64, 128."""
    components: str = ""
    """Graphs to quantize, separated by commas; the denoiser if not given."""
    fused: bool = False
    """Also write the whole pipeline as one graph; of int8-dynamic and int8-static."""
    skip: tuple[str, ...] = ()
    """Layers that stay float; see above."""
    prompts: Path | None = None
    """Text file, one prompt per line, to calibrate and compare with; built-in if not given."""
    distil: int = 0
    """Steps of training that make up for the fewer bits; needs --base (and --adapter)."""
    base: str | None = None
    """Pipeline the folder was made from: folder, hub id, digits-sd3 or digits-sd15."""
    adapter: str | None = None
    """The few-step LoRA it was made with."""
    recipe: Path | None = None
    """Recipe file it was made with, if not the adapter's."""
    report: Path | None = None
    """HTML file to write, pictures side by side; not inside --out."""
    threads: int = 0
    """Of one network call; 0 takes ONNX Runtime's choice."""
    overwrite: bool = False
    """Replace what is in --out."""
    force: bool = False
    """Publish even if it differs too much or is slower."""


def run(options: QuantizeOptions, console: Console) -> None:
    """Quantize, check, publish.

    Args:
        options: What the user asked for.
        console: For progress and text.

    Raises:
        FewstepError: The request cannot be served, or the result is refused.
    """
    from fewstep.export.writing import check_report, whole_folder

    _check(options)
    check_report(options.report, options.out)
    if options.fused:
        from fewstep.export.quantizing.fused_form import check_fusable

        check_fusable(options.precision, options.activations)
    from fewstep.export.checking.findings import write_figures
    from fewstep.export.checking.gate import examine
    from fewstep.export.checking.prompts import read_prompts
    from fewstep.export.checking.reference import folder_reference
    from fewstep.export.quantizing.nvfp4_twin import examine_twin, unverified
    from fewstep.export.quantizing.quantized_folder import FUSED, open_float_folder
    from fewstep.runtime.export_folder import ExportFolder

    source = open_float_folder(options.folder)
    if options.fused:
        from fewstep.export.fused.fusing import check_can_be_fused

        check_can_be_fused(source.manifest.pipeline, source.recipe, None)
    prompts = read_prompts(options.prompts)
    with (
        console.status("quantizing") as status,
        whole_folder(options.out, overwrite=options.overwrite) as folder,
    ):

        def tell(what: str) -> None:
            status.update(what)

        _, results = write_quantized(source, folder, options, prompts, tell)
        if options.fused:
            from fewstep.export.quantizing.fused_form import write_fused

            tell("fused graph")
            write_fused(source, folder)
        made = ExportFolder.open(folder)
        reference = folder_reference(options.folder, threads=options.threads)
        examined = examine_twin if options.precision == "nvfp4" else examine
        found = examined(made, reference, prompts, threads=options.threads, progress=tell)
        if options.report is not None:
            from fewstep.export.checking.report import save_report

            save_report(options.report, found)
        found.require(force=options.force)
        entered = unverified(found.entered(made.manifest))
        every = (*made.manifest.measured, *entered.measured)  # the fused graph's first
        write_figures(folder, dataclasses.replace(entered, measured=every))
    show(results, console)
    word = "and passes" if found.is_good else "though it fails"
    console.print(f"wrote {options.out}: {options.precision}, {word}", highlight=False)
    for doubt in found.doubts:
        console.print(doubt, highlight=False, markup=False)
    if options.precision == "nvfp4":
        console.print(
            "checked in float; no engine was built: TensorRT 10.14 or newer and a Blackwell GPU "
            "(sm_100, sm_120) run it",
            highlight=False,
        )
    if FUSED in source.manifest.graphs and not options.fused:
        console.print(
            "without a fused graph: draw from the components, or see --fused",
            highlight=False,
        )


def _check(options: QuantizeOptions) -> None:
    if options.distil < 0:
        raise ExportError(f"--distil is {options.distil}; give a number of training steps above 0")
    if options.distil and options.base is None:
        raise ExportError("--distil trains the torch network; give its --base (and --adapter)")
    if options.precision != "int8-static" and options.activations != "uint8":
        raise ExportError(
            f"--activations is of int8-static, and {options.precision} was asked for; leave it out"
        )
    measured = [word for word in options.skip if word.startswith(("auto:", "budget:"))]
    if options.precision == "nvfp4" and measured:
        raise ExportError(
            f"--skip got {measured[0]!r}, and nvfp4 cannot be run here to measure layers; name "
            "layers with regular expressions"
        )
    if options.block not in (16, 32, 64, 128):
        raise ExportError(f"--block is {options.block}; use 16, 32, 64 or 128")


def scheme_of(options: QuantizeOptions) -> "Scheme":
    """How the graphs are written.

    Raises:
        MissingExtraError: nvidia-modelopt is wanted and not installed.
    """
    from fewstep.export.quantizing.schemes import Int4, Int8Dynamic, Int8Static

    if options.precision == "int8-dynamic":
        return Int8Dynamic()
    if options.precision == "int8-static":
        return Int8Static(options.activations)
    if options.precision == "int4":
        return Int4(options.block)
    if options.precision == "nvfp4":
        from fewstep.export.quantizing.nvfp4_scheme import NvFp4

        return NvFp4()
    from fewstep.export.quantizing.modelopt_scheme import ModelOptFp8, ModelOptInt8

    return ModelOptFp8() if options.precision == "fp8" else ModelOptInt8()


def write_quantized(
    source: "ExportFolder",
    folder: Path,
    options: QuantizeOptions,
    prompts: "Sequence[str]",
    progress: "Callable[[str], None]",
) -> "tuple[Manifest, tuple[Result, ...]]":
    """Write the new folder, after training where that was asked for."""
    from fewstep.export.quantizing.plan import Plan
    from fewstep.export.quantizing.quantized_folder import chosen_components, quantize_into
    from fewstep.export.quantizing.skipping import parse_skips

    scheme = scheme_of(options)
    names = tuple(name.strip() for name in options.components.split(",") if name.strip())
    plan = Plan(
        scheme=scheme,
        components=chosen_components(source, names),
        skips=parse_skips(options.skip),
        prompts=tuple(prompts),
        threads=options.threads,
    )
    if options.distil:
        plan = _distilled(source, plan, options, progress)
    return quantize_into(source, folder, plan, progress=progress)


def _distilled(
    source: "ExportFolder",
    plan: "Plan",
    options: QuantizeOptions,
    progress: "Callable[[str], None]",
) -> "Plan":
    from fewstep.cli.bases import resolve_base
    from fewstep.export.merging import load_merged
    from fewstep.export.quantizing.distilling import distil

    assert options.base is not None
    merged = load_merged(resolve_base(options.base), options.adapter, options.recipe)
    made = distil(source, merged, plan, steps=options.distil, progress=progress)
    return dataclasses.replace(plan, distilled=made)


def show(results: "Sequence[Result]", console: Console) -> None:
    """Print sizes, what stayed float, and sensitivities where they were measured."""
    for result in results:
        if result.sensitivities is not None:
            console.print(result.sensitivities.table(result.skipped))
            if not result.sensitivities.is_settled:
                console.print(
                    f"{result.name}: measuring stopped before every group above these layers was "
                    "divided; a layer in one may be as sensitive",
                    highlight=False,
                )
        console.print(
            f"{result.name}: {result.bytes_before} bytes before, {result.bytes_after} after "
            f"({result.ratio:.3f} x); {len(result.quantized)} layers quantized, "
            f"{len(result.skipped)} stay float",
            highlight=False,
        )
