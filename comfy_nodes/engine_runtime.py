"""An export folder on an engine: what MODEL, CLIP and VAE share. No ComfyUI."""

import json
import threading
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

from fewstep.comfy_nodes.engine_families import Family, served
from fewstep.comfy_nodes.engine_folders import state_of
from fewstep.errors import RuntimeSettingError
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.host import Parts
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.providers import make_loader
from fewstep.runtime.session import Loader, Session

ON_GPU = ("cuda", "tensorrt", "tensorrt-native", "directml")
"""Providers whose weights lie in GPU memory, where ComfyUI's models lie too."""


class Engine:
    """One export folder; graphs are loaded when they are first asked for. Safe to share.

    Args:
        name: What to call it in messages.
        folder: The folder, opened.
        loader: Of its graphs.

    Attributes:
        family: How ComfyUI calls it.
        host: Its prompt encoding and network inputs.

    Raises:
        RuntimeSettingError: ComfyUI cannot sample it.
    """

    def __init__(self, name: str, folder: ExportFolder, loader: Loader) -> None:
        self.name, self.folder, self._loader = name, folder, loader
        manifest, recipe = folder.manifest, folder.recipe
        self.family: Family = served(manifest.family, recipe, name)
        parts = Parts(self.session, folder.tokenizer)
        self.host = host_of(manifest.family)(manifest, recipe, parts)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    @property
    def provider(self) -> str:
        """What runs the graphs."""
        return self._loader.name

    def session(self, component: str) -> Session:
        """A graph, loaded once.

        Raises:
            RuntimeSettingError: The folder does not have it.
        """
        with self._lock:
            if component not in self._sessions:
                graph = self.folder.manifest.graphs.get(component)
                if graph is None:
                    raise RuntimeSettingError(
                        f"'{self.name}' has no {component}; export the whole pipeline again."
                    )
                self._sessions[component] = self._loader.load(graph)
            return self._sessions[component]

    def release(self) -> None:
        """Drop every loaded graph; they are loaded again when asked for."""
        with self._lock:
            self._sessions.clear()

    @property
    def missing_bytes(self) -> int:
        """GPU memory that the network's weights will take when it is next called."""
        component = self.host.denoiser
        if self.provider not in ON_GPU or component in self._sessions:
            return 0
        manifest = self.folder.manifest
        file = manifest.graphs[component].file
        stored = [manifest.files[name] for name in (file, f"{file}_data") if name in manifest.files]
        return sum(one.bytes for one in stored)

    @cached_property
    def largest_side(self) -> int | None:
        """Pixels: SD3 learned a place for every patch of a grid this large; others have no end."""
        file = self.folder.root / self.host.denoiser / "config.json"
        if not file.is_file():
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
        places = config.get("pos_embed_max_size")
        return places * config["patch_size"] * self.host.factor if places else None


_OPEN: WeakValueDictionary[tuple[Path, str, str], Engine] = WeakValueDictionary()
"""Engines in use: two nodes on one folder share its graphs."""


def open_engine(name: str, root: Path, provider: str) -> Engine:
    """An engine on a folder; the one in use where there is one.

    Args:
        name: What to call it in messages.
        root: The folder.
        provider: One of `engine_packages.PROVIDERS`, whose packages are there.

    Raises:
        RuntimeSettingError: ComfyUI cannot sample it, or the provider is not there.
        ExportFolderError: It is damaged or of another release.
        RecipeError: Its recipe is.
    """
    key = (root, provider, state_of(root))
    engine = _OPEN.get(key)
    if engine is None:
        folder = ExportFolder.open(root)
        served(folder.manifest.family, folder.recipe, name)  # before "auto" measures anything
        engine = _OPEN[key] = Engine(name, folder, make_loader(folder, provider))
    return engine
