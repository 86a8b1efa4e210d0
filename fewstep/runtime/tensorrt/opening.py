"""From an export folder to a session: finds the engine that fits this machine."""

from pathlib import Path

from fewstep.errors import ExportFolderError
from fewstep.runtime.export_folder import file_sha256
from fewstep.runtime.manifest import Graph, Manifest
from fewstep.runtime.tensorrt.cache import FOLDER, EngineCache, fitting_engine
from fewstep.runtime.tensorrt.preflight import this_installation
from fewstep.runtime.tensorrt.session import PROVIDER, TensorRtSession


class TensorRtLoader:
    """Loads a folder's engines (`fewstep.runtime.session.Loader`).

    Args:
        folder: The export folder.
        manifest: Of the folder.
        device: GPU.
        cache: Folder of engines; None is the export folder's own.

    Attributes:
        name: "tensorrt-native", to tell it from ONNX Runtime's TensorRT provider.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: int = 0, cache: Path | None = None
    ) -> None:
        self.name = PROVIDER
        self._folder, self._manifest = folder, manifest
        self._device, self._cache = device, cache

    def load(self, graph: Graph) -> TensorRtSession:
        """Load the engine of one graph.

        Raises:
            RuntimeSettingError: See `open_session`.
        """
        graphs = self._manifest.graphs
        component = next(name for name, known in graphs.items() if known == graph)
        return open_session(
            self._folder, self._manifest, component, device=self._device, cache=self._cache
        )


def open_session(
    folder: Path,
    manifest: Manifest,
    component: str,
    *,
    device: int = 0,
    cache: Path | None = None,
    weight_budget_bytes: int | None = None,
) -> TensorRtSession:
    """A session over the engine of one component.

    Args:
        folder: Of the export.
        manifest: Of the folder.
        component: A key of `manifest.graphs`.
        device: GPU.
        cache: Folder of engines; None is the export folder's own.
        weight_budget_bytes: GPU memory for weights, where the engine streams them.

    Raises:
        MissingExtraError: TensorRT or CUDA's bindings are not installed.
        RuntimeSettingError: No GPU, or no engine for this machine; the message says which one
            there is.
        ExportFolderError: The component or its files are missing, or were changed.
    """
    if component not in manifest.graphs:
        raise ExportFolderError(f"{folder} has no {component}; it has {', '.join(manifest.graphs)}")
    here = this_installation(device)
    graph = manifest.graphs[component]
    engines = EngineCache(cache or folder / FOLDER)
    engine = fitting_engine(
        engines,
        component,
        here,
        onnx_sha256=file_sha256(folder / graph.file),
        data_sha256=data_sha256(folder, manifest, graph),
    )
    return TensorRtSession(
        engines.plan(engine),
        graph,
        device=device,
        weight_budget_bytes=weight_budget_bytes,
        weights_from=folder / graph.file if engine.needs_weights else None,
    )


def data_sha256(folder: Path, manifest: Manifest, graph: Graph) -> str:
    """SHA-256 of a graph's weights; empty where they are in the graph.

    The manifest's word is taken: weights are gigabytes, and `ExportFolder.open(verify=True)` reads
    them where that is wanted.
    """
    name = f"{graph.file}_data"
    if name in manifest.files:
        return manifest.files[name].sha256
    return file_sha256(folder / name) if (folder / name).is_file() else ""
