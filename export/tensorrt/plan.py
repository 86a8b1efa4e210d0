"""All that is decided before TensorRT is touched: key, profiles, legality, memory, place."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import ExportError
from fewstep.export.tensorrt.graph import read_graph
from fewstep.export.tensorrt.legality import Report, check_graph
from fewstep.export.tensorrt.memory import MemoryEstimate, estimate_memory
from fewstep.export.tensorrt.profiles import make_profile, profile_problems
from fewstep.export.tensorrt.refittable import refittable_weights
from fewstep.export.tensorrt.sizes import (
    PictureSize,
    SizeRange,
    prompt_range,
    symbol_ranges,
)
from fewstep.runtime.export_folder import file_sha256
from fewstep.runtime.manifest import Graph, Manifest
from fewstep.runtime.tensorrt.cache import EngineCache
from fewstep.runtime.tensorrt.identity import EngineIdentity, Installation

DATA = "model.onnx_data"
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        optimization_level: 0 to 5; 3 is TensorRT's default, 5 takes much longer.
        workspace_bytes: Limit of scratch memory.
        uses_tf32: Let float32 products be rounded to TF32.
        streams_weights: Keep weights in host memory and bring them as needed.
        strips_weights: Leave weights out of the plan; they are read from the ONNX file at load.
        is_version_compatible: Let newer releases of the same major load the plan.
        refit_for: An adapter whose weights stay replaceable.
    """

    optimization_level: int = 3
    workspace_bytes: int = 4 * GIB
    uses_tf32: bool = False
    streams_weights: bool = False
    strips_weights: bool = False
    is_version_compatible: bool = False
    refit_for: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ExportError(
                f"--optimization-level is {self.optimization_level}, wanted 0 to 5; 3 is usual"
            )
        if self.strips_weights and self.refit_for is not None:
            raise ExportError(
                "--strip-plan promises that weights come back unchanged and --refit that they do "
                "not; give one of them"
            )

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's BuilderFlag, sorted."""
        chosen = {
            "TF32": self.uses_tf32,
            "WEIGHT_STREAMING": self.streams_weights,
            "STRIP_PLAN": self.strips_weights,
            "REFIT_IDENTICAL": self.strips_weights,
            "VERSION_COMPATIBLE": self.is_version_compatible,
            "REFIT_INDIVIDUAL": self.refit_for is not None,
        }
        return tuple(sorted(name for name, is_on in chosen.items() if is_on))


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """What would be built, and where.

    Attributes:
        component: Of the manifest.
        graph: Its contract.
        onnx: Its file.
        identity: Decides the key.
        ranges: Symbol -> range.
        report: What speaks against it.
        memory: Counted at the largest sizes.
        cache: Where engines lie.
    """

    component: str
    graph: Graph
    onnx: Path
    identity: EngineIdentity
    ranges: dict[str, SizeRange]
    report: Report
    memory: MemoryEstimate
    cache: EngineCache

    @property
    def folder(self) -> Path:
        """Where the plan would lie."""
        return self.cache.folder(self.component, self.identity)


def plan_engine(
    folder: Path,
    manifest: Manifest,
    component: str,
    *,
    here: Installation,
    settings: BuildSettings,
    sizes: tuple[PictureSize, ...],
    batch: SizeRange,
    stated: Mapping[str, SizeRange],
    cache: EngineCache,
) -> EnginePlan:
    """Decide everything about one engine.

    Args:
        folder: Of the export.
        manifest: Of the folder.
        component: A key of its graphs.
        here: What the engine is for: release of TensorRT, CUDA, GPU, system.
        settings: How to build.
        sizes: Pictures it must draw.
        batch: Pictures at once.
        stated: See `symbol_ranges`.
        cache: Where engines lie.

    Raises:
        ExportError: The component is unknown, a file is missing or a size does not fit.
    """
    if component not in manifest.graphs:
        raise ExportError(f"{folder} has no {component}; it has {', '.join(manifest.graphs)}")
    graph = manifest.graphs[component]
    onnx = folder / graph.file
    ranges = symbol_ranges(
        manifest,
        component,
        sizes=sizes,
        batch=batch,
        prompt=prompt_range(folder, manifest, component),
        stated=stated,
    )
    profile = make_profile(graph, ranges)
    problems = profile_problems(graph, profile)
    if problems:
        raise ExportError(f"the ranges of {component} contradict its graph: {problems[0]}")
    major, minor = (int(part) for part in here.tensorrt.split(".")[:2])
    report = check_graph(onnx, tensorrt=(major, minor))
    read = read_graph(onnx)
    refittable: tuple[str, ...] = ()
    adapter_sha256 = ""
    if settings.refit_for is not None:
        refittable = refittable_weights(read, component, settings.refit_for)
        adapter_sha256 = file_sha256(settings.refit_for)
    data = onnx.with_name(DATA)
    identity = EngineIdentity(
        onnx_sha256=file_sha256(onnx),
        data_sha256=file_sha256(data) if data.is_file() else "",
        adapter_sha256=adapter_sha256,
        tensorrt=here.tensorrt,
        cuda=here.cuda,
        sm=here.sm,
        system=here.system,
        flags=settings.flags,
        profiles=(profile,),
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace_bytes,
        refittable=refittable,
    )
    largest = {entry.name: entry.max for entry in profile.ranges}
    return EnginePlan(
        component=component,
        graph=graph,
        onnx=onnx,
        identity=identity,
        ranges=ranges,
        report=report,
        memory=estimate_memory(onnx, largest),
        cache=cache,
    )


def sha256_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()
