"""Which engine runs the graphs: the one named, or the fastest of those that are there."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fewstep import __version__
from fewstep.errors import FewstepError, MissingExtraError
from fewstep.runtime.cache_folder import cache_folder, key_of, machine, write_whole
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Loader

FEWEST, MOST, ENOUGH_S = 3, 50, 1.0
"""Timed calls per graph after one that is not: at least, at most, and for how long."""
SMALL = {"sequence_length": 77, "batch_size": 1, "num_frames": 1} | dict.fromkeys(
    ("latent_height", "latent_width"), 8
)
SIDE = 32
"""Latents per side that engines are compared at, unless the graph asks for a multiple."""
ENGINE_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "openvino")
"""Distributions that bring the engines, by the names they are installed under."""
AUTOMATIC = ("cuda", "openvino", "cpu")
"""Engines that "auto" compares, which draw the same picture; others are used by name.

TensorRT's is the same only where NVIDIA_TF32_OVERRIDE is 0 in the environment: see onnx_providers.
"""


def make_loader(
    folder: ExportFolder, provider: str, *, threads: int = 0, has_cache: bool = True
) -> Loader:
    """The loader of an engine.

    Args:
        folder: What will be loaded.
        provider: An engine's name, or "auto".
        threads: Of one call; 0 takes the engine's choice.
        has_cache: Whether what can be made again is kept.

    Raises:
        RuntimeSettingError: The engine is unknown or not there.
        MissingExtraError: Its package is not installed.
    """
    if provider == "auto":
        provider = _fastest(folder, threads, has_cache)
    return _named(folder, provider, threads, has_cache)


def _named(folder: ExportFolder, provider: str, threads: int, has_cache: bool) -> Loader:
    if provider == "tensorrt-native":
        from fewstep.runtime.tensorrt.opening import TensorRtLoader

        return TensorRtLoader(folder.root, folder.manifest)
    if provider == "tensorrt":
        from fewstep.runtime.tensorrt.preflight import check_ort_tensorrt, installed_tensorrt

        check_ort_tensorrt(installed_tensorrt())
    if provider in ("openvino", "openvino-bf16"):
        if find_spec("openvino") is None:
            raise MissingExtraError("openvino", "openvino")
        from fewstep.runtime.openvino_session import OpenVinoLoader

        arithmetic = "f32" if provider == "openvino" else "bf16"
        files = folder.manifest.files
        return OpenVinoLoader(folder.root, files, arithmetic, threads=threads, has_cache=has_cache)
    if find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "runtime")
    from fewstep.runtime.onnx_session import OnnxLoader

    return OnnxLoader(
        folder.root, folder.manifest.files, provider, threads=threads, has_cache=has_cache
    )


def _fastest(folder: ExportFolder, threads: int, has_cache: bool) -> str:
    there = candidates()
    if len(there) == 1:
        return there[0]
    choice = _remembered(folder, there, threads) if has_cache else None
    name = None if choice is None else _read_choice(choice)
    if name is not None and name in there:
        return name
    seconds = compare(folder, there, threads)
    best = min(seconds, key=seconds.__getitem__)
    if choice is not None:
        with suppress(OSError):  # a read-only home: it is measured again next time
            write_whole(choice, json.dumps({"provider": best, "seconds": seconds}, indent=1))
    return best


def candidates() -> list[str]:
    """Engines that are installed here, of those that are compared."""
    there: list[str] = []
    if find_spec("onnxruntime") is not None:
        from fewstep.runtime.onnx_session import available_providers

        there += available_providers()
    if find_spec("openvino") is not None:
        there.append("openvino")
    if not there:
        raise MissingExtraError("onnxruntime", "runtime")
    return [name for name in AUTOMATIC if name in there]


def compare(folder: ExportFolder, names: list[str], threads: int) -> dict[str, float]:
    """Seconds that a picture takes on each engine: the denoiser's steps and one decoding.

    An engine that fails is left out with a warning; at least one must not.
    """
    found: dict[str, float] = {}
    problem: FewstepError | None = None
    for name in names:
        try:
            found[name] = _seconds(folder, _named(folder, name, threads, has_cache=False))
        except FewstepError as error:
            problem = error
            warnings.warn(f"provider {name} is left out: {error}", stacklevel=2)
    if not found:
        assert problem is not None
        raise problem
    return found


def _seconds(folder: ExportFolder, loader: Loader) -> float:
    total = 0.0
    for graph, calls in _compared(folder):
        session = loader.load(graph)
        feeds = sample_feeds(graph, _trained_sizes(folder))
        total += calls * _least(lambda s=session, f=feeds: s.run(f))
    return total


def _trained_sizes(folder: ExportFolder) -> dict[str, int]:
    """Latents of the size the model was trained at, which every graph can do."""
    settings = folder.manifest.settings
    side = int(settings.get("sample_size", SIDE))
    patch = int(settings.get("patch_size", 1))
    latents = ("height", "width", "latent_height", "latent_width")
    return {**dict.fromkeys(latents, side), "packed_height_width": (side // patch) ** 2}


def _compared(folder: ExportFolder) -> list[tuple[Graph, int]]:
    """Graphs, and how often one picture calls them."""
    steps = folder.recipe.default_steps
    calls = {"unet": steps, "transformer": steps, "vae_decoder": 1}
    graphs = folder.manifest.graphs
    return [(graphs[name], count) for name, count in calls.items() if name in graphs]


def _least(call: Callable[[], object]) -> float:
    """Seconds of the quickest call: whatever else the machine does only adds to it."""
    call()
    taken: list[float] = []
    while len(taken) < FEWEST or (len(taken) < MOST and sum(taken) < ENOUGH_S):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def sample_feeds(graph: Graph, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Inputs of a plausible size, filled with a seeded noise.

    Args:
        graph: Whose inputs.
        sizes: Symbol -> size; others are small.
    """
    generator = np.random.default_rng(0)
    feeds = {}
    for tensor in graph.inputs:
        shape = [_side(graph, dim, sizes or {}) for dim in tensor.dims]
        if tensor.dtype in ("int64", "int32"):
            feeds[tensor.name] = np.ones(shape, tensor.dtype)
        else:
            feeds[tensor.name] = generator.standard_normal(shape).astype(tensor.dtype)
    return feeds


def _side(graph: Graph, dim: str, sizes: Mapping[str, int]) -> int:
    if dim.isdigit():
        return int(dim)
    if dim in sizes:
        return sizes[dim]
    multiple = graph.multiples.get(dim, 1)
    wanted = SMALL.get(dim, SIDE)
    return max(multiple, wanted // multiple * multiple)


def _remembered(folder: ExportFolder, there: list[str], threads: int) -> Path:
    sums = sorted(stored.sha256 for stored in folder.manifest.files.values())
    key = key_of(sums, there, threads, machine(), _versions())
    return cache_folder() / "providers" / f"{key}.json"


def _read_choice(file: Path) -> str | None:
    """What was chosen before; None where nothing was, or the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a cache: it is measured again
        return None
    name = found.get("provider") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _versions() -> list[str | None]:
    """Of whatever decides which engine is the fastest: after an upgrade it is measured again."""
    return [__version__, *(_version(name) for name in ENGINE_PACKAGES)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
