"""`fewstep export tensorrt DIR --target sm90`: shows what would be built, or builds it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional

from fewstep.cli.picture_folder import read_size
from fewstep.errors import ExportError
from fewstep.export.tensorrt import NOT_VERIFIED
from fewstep.export.tensorrt.sizes import (
    PictureSize,
    parse_named_range,
    parse_range,
)
from fewstep.export.tensorrt.target import parse_target
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.host import Size, check_largest_side
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Manifest
from fewstep.runtime.tensorrt.cache import FOLDER, EngineCache
from fewstep.runtime.tensorrt.identity import Installation, this_system
from fewstep.runtime.tensorrt.preflight import (
    check_version,
    installed_tensorrt,
    this_installation,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fewstep.export.tensorrt.plan import EnginePlan

ASSUMED_TENSORRT = "11.4.0.106"
"""Release a dry run is for where none is installed and none was named."""
ASSUMED_CUDA = 13

HELP = """\
Build TensorRT engines from an export folder, for one GPU architecture and a narrow range of sizes.

Without --build nothing is built: key, sizes, findings, memory and the plan's place are shown, for
which neither a GPU nor TensorRT is needed. Exit status 2 where TensorRT would refuse a graph.
Sizes are HEIGHTxWIDTH, as in `fewstep draw`.

Examples:
  fewstep export tensorrt out --target sm90
  fewstep export tensorrt out --target sm90 --size 1024x1024 1216x832 --build
  fewstep export tensorrt out --target sm89 --components transformer vae_decoder --batch 1:2:8
  fewstep export tensorrt out --target sm90 --refit student.safetensors --build"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtOptions:
    """Build TensorRT engines from an export folder."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder `fewstep export onnx` made."""
    target: str
    """GPU architecture, such as sm90."""
    build: bool = False
    """Build; needs TensorRT and the GPU."""
    dry_run: bool = False
    """Only show what would be built; the default."""
    components: tuple[str, ...] = ()
    """Graphs to build; none means all of the folder."""
    size: tuple[str, ...] = ()
    """Pictures to draw, HEIGHTxWIDTH; the first is tuned for. None: the model's own size."""
    batch: str = "1:1:4"
    """Pictures at once, MIN:OPT:MAX."""
    range: tuple[str, ...] = ()
    """Other sizes, SYMBOL=MIN:OPT:MAX or COMPONENT.SYMBOL=MIN:OPT:MAX."""
    optimization_level: int = 3
    """0 builds fastest, 5 searches longest."""
    workspace_gib: float = 4.0
    """Limit of scratch memory."""
    tf32: bool = False
    """Let float32 products be rounded to TF32: faster, and pictures differ."""
    weight_streaming: bool = False
    """Keep weights in host memory, for GPUs that do not hold them."""
    strip_plan: bool = False
    """Leave weights out of the plan and read them from the ONNX file at load."""
    version_compatible: bool = False
    """Let newer releases of the same major load the plan."""
    refit: Path | None = None
    """A LoRA (diffusers names): the weights it changes stay replaceable."""
    tensorrt: str | None = None
    """Release of TensorRT a dry run is for; the installed one if there is one."""
    cache: Path | None = None
    """Folder of engines; DIR/tensorrt if not given."""


def run(options: TensorRtOptions, console: Console) -> None:
    """Show the plans; build them if asked.

    Args:
        options: What the user asked for.
        console: For text and progress.

    Raises:
        FewstepError: The request cannot be served; one sentence.
    """
    if options.build and options.dry_run:
        raise ExportError("--build and --dry-run were both given; give one")
    plans = make_plans(options)
    for plan in plans:
        show(plan, console)
    console.print(NOT_VERIFIED, style="yellow")
    require_legal(plans)  # all of them, before minutes go into the first
    if not options.build:
        return
    from fewstep.export.tensorrt.build import build_engine

    for plan in plans:
        with Progress(console=console) as bars:
            engine = build_engine(plan, bars)
        size = _megabytes(engine.plan_bytes)
        console.print(f"{plan.component}: {size} in {engine.seconds} s, {plan.folder}")


def require_legal(plans: "Sequence[EnginePlan]") -> None:
    """Refuse graphs that TensorRT would refuse; `show` told why.

    Raises:
        ExportError: Names them, and how to go on without them.
    """
    refused = [plan.component for plan in plans if not plan.report.is_legal]
    if not refused:
        return
    legal = " ".join(plan.component for plan in plans if plan.report.is_legal)
    others = f", or go on with --components {legal}" if legal else ""
    raise ExportError(
        f"TensorRT would refuse {', '.join(refused)}, for the reasons listed above; export again "
        f"in a form that it takes{others}"
    )


def make_plans(options: TensorRtOptions) -> "list[EnginePlan]":
    """Decide about every engine asked for.

    Raises:
        FewstepError: A file, size or setting is wrong, or --build finds no GPU of this target.
    """
    from fewstep.export.tensorrt.plan import GIB, BuildSettings, plan_engine

    manifest = ExportFolder.open(options.folder, verify=True).manifest
    host_of(manifest.family)
    settings = BuildSettings(
        optimization_level=options.optimization_level,
        workspace_bytes=int(options.workspace_gib * GIB),
        uses_tf32=options.tf32,
        streams_weights=options.weight_streaming,
        strips_weights=options.strip_plan,
        is_version_compatible=options.version_compatible,
        refit_for=options.refit,
    )
    here = _installation(options)
    sizes = tuple(_picture_size(text, manifest) for text in options.size)
    return [
        plan_engine(
            options.folder,
            manifest,
            component,
            here=here,
            settings=settings,
            sizes=sizes or (native_size(options.folder, manifest),),
            batch=parse_range(options.batch),
            stated=dict(parse_named_range(text) for text in options.range),
            cache=EngineCache(options.cache or options.folder / FOLDER),
        )
        for component in options.components or tuple(manifest.graphs)
    ]


def native_size(folder: Path, manifest: Manifest) -> PictureSize:
    """What the denoiser's config.json says it was trained for, in pixels.

    Raises:
        ExportError: It does not say.
    """
    factor = int(manifest.settings.get("vae_scale_factor", 8))
    for component in ("unet", "transformer"):
        file = folder / component / "config.json"
        if file.is_file():
            size = json.loads(file.read_text(encoding="utf-8")).get("sample_size")
            if isinstance(size, int):
                return PictureSize(size * factor, size * factor)
    raise ExportError(f"{folder} does not say which size its model draws; give --size HEIGHTxWIDTH")


def _picture_size(text: str, manifest: Manifest) -> PictureSize:
    height, width = read_size(text)
    check_largest_side(manifest, Size(height, width))
    return PictureSize(width, height)


def show(plan: "EnginePlan", console: Console) -> None:
    """Print one plan."""
    identity, memory = plan.identity, plan.memory
    table = Table(title=plan.component, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("key", identity.key)
    table.add_row("for", f"TensorRT {identity.tensorrt}, CUDA {identity.cuda}, {identity.sm}")
    table.add_row("flags", " ".join(identity.flags) or "none")
    for symbol, found in plan.ranges.items():
        table.add_row(symbol, str(found))
    for entry in identity.profiles[0].ranges:
        shapes = (entry.min, entry.opt, entry.max)
        table.add_row(entry.name, " | ".join("x".join(map(str, s)) or "scalar" for s in shapes))
    if identity.refittable:
        table.add_row("replaceable", f"{len(identity.refittable)} weights")
    counted = f"{memory.values - memory.unknown} of {memory.values} values counted"
    table.add_row(
        "memory",
        f"weights {_megabytes(memory.weights)}, activations {_megabytes(memory.activations)} "
        f"({counted}, before fusion), inputs and outputs {_megabytes(memory.inputs_and_outputs)}",
    )
    table.add_row("plan", str(plan.folder / "engine.plan"))
    legal = "nothing speaks against it" if plan.report.is_legal else "TensorRT would refuse it"
    table.add_row("legality", f"opset {plan.report.opset}: {legal} (statically checked)")
    for finding in plan.report.findings:
        table.add_row(finding.rule, f"{finding.node}: {finding.message}")
    console.print(table)


def _installation(options: TensorRtOptions) -> Installation:
    target = parse_target(options.target)
    if options.build:
        here = this_installation()
        if here.sm != target.sm:
            raise ExportError(
                f"--target is {target.sm} and this machine's GPU is {here.sm}; build on a "
                f"{target.name} GPU, or give --target {here.sm}"
            )
        return here
    version = options.tensorrt or installed_tensorrt() or ASSUMED_TENSORRT
    if len([part for part in version.split(".") if part.isdigit()]) < 2:
        raise ExportError(f"--tensorrt is {version!r}, wanted a version such as {ASSUMED_TENSORRT}")
    check_version(version)
    return Installation(tensorrt=version, cuda=ASSUMED_CUDA, sm=target.sm, system=this_system())


def _megabytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
