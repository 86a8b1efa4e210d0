"""Graphs on ONNX Runtime."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.cache_folder import (
    cache_folder,
    clear_partials,
    key_of,
    machine,
    partial_name,
)
from fewstep.runtime.manifest import Graph, StoredFile
from fewstep.runtime.onnx_providers import PROVIDERS, Asked, asked_providers, check_running
from fewstep.runtime.session import Feeds, Session


def available_providers() -> tuple[str, ...]:
    """Our names of the engines that this installation of ONNX Runtime has."""
    there = ort.get_available_providers()
    return tuple(name for name, theirs in PROVIDERS.items() if theirs in there)


class OnnxLoader:
    """Loads graphs of a folder with ONNX Runtime.

    Args:
        folder: The export folder.
        files: Checksums of its files, which name the optimised copies.
        provider: "cpu", "cuda", "tensorrt", "coreml" or "directml".
        threads: Of one call; 0 takes ONNX Runtime's own choice, one per physical core.
        has_cache: Whether graphs optimised for this processor, or TensorRT's engines, are kept for
            the next start.

    Raises:
        RuntimeSettingError: This installation does not have the provider.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, StoredFile],
        provider: str = "cpu",
        *,
        threads: int = 0,
        has_cache: bool = True,
    ) -> None:
        check_provider(provider)
        self.name = provider
        self._folder, self._files = folder, files
        self._threads, self._has_cache = threads, has_cache

    def load(self, graph: Graph) -> Session:
        """Load one graph, from its optimised copy where there is one.

        Raises:
            ExportFolderError: The file or its weights are missing or damaged.
            RuntimeSettingError: ONNX Runtime has the provider and cannot start it.
        """
        file = self._folder / graph.file
        if not file.is_file():
            raise ExportFolderError(f"{file} is missing; export again, or copy the whole folder")
        optimised, engines = self._optimised(graph), self._engines(graph)
        kept = None if optimised is None else self._kept(optimised)
        if kept is None and optimised is not None:
            self._keep(file, optimised)
            kept = self._kept(optimised)
        session = kept or self._open(file, self._options(), asked_providers(self.name, engines))
        check_running(self.name, session.get_providers())
        return OnnxSession(session, graph, self.name)

    def _kept(self, optimised: Path) -> ort.InferenceSession | None:
        """The optimised copy; None where there is none, or it is damaged."""
        if not optimised.is_file():
            return None
        options = self._options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._open(optimised, options, asked_providers(self.name))
        except ExportFolderError:  # a cache: it is made again
            shutil.rmtree(optimised.parent, ignore_errors=True)
            return None

    def _keep(self, file: Path, optimised: Path) -> None:
        """Write the optimised copy; a full disk or a read-only home leaves none."""
        options = self._options()
        partial = partial_name(optimised.parent)
        options.optimized_model_filepath = str(partial / optimised.name)
        entries = {
            "session.optimized_model_external_initializers_file_name": f"{optimised.name}_data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            # Weights also as this processor's products want them: mapped from the file and not held
            # in the process's own memory. A first picture at SD 1.5's size comes in 6.1 s, not 8.2.
            "session.save_external_prepacked_constant_initializers": "1",
        }
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        try:
            clear_partials(partial.parent)
            partial.mkdir(parents=True)
            self._open(file, options, asked_providers(self.name))
            os.replace(partial, optimised.parent)
        except (OSError, ExportFolderError):
            return  # also where somebody else made it meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _options(self) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Each graph has threads of its own; those of the last one must not spin beside the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        return options

    def _open(self, file: Path, options: Any, asked: list[Asked]) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(str(file), options, providers=asked)
        except Exception as error:  # ONNX Runtime's exceptions share no class of their own
            raise ExportFolderError(
                f"{file} cannot be loaded ({_first_line(error)}); run `fewstep export check "
                f"{self._folder}`, or export again"
            ) from error

    def _optimised(self, graph: Graph) -> Path | None:
        """Where this graph's optimised copy lies; None where none is kept."""
        sums = self._sums(graph)
        if self.name != "cpu" or not sums:
            return None
        key = key_of(sums, ort.__version__, machine(), "prepacked")
        return cache_folder() / "graphs" / key / "model.onnx"

    def _engines(self, graph: Graph) -> Path | None:
        """Where ONNX Runtime keeps this graph's TensorRT engines; None where it keeps none."""
        sums = self._sums(graph)
        if self.name != "tensorrt" or not sums:
            return None
        folder = cache_folder() / "onnxruntime-tensorrt" / key_of(sums, ort.__version__)
        with suppress(OSError):  # ONNX Runtime makes the last folder of a path alone
            folder.mkdir(parents=True, exist_ok=True)
        return folder if folder.is_dir() else None

    def _sums(self, graph: Graph) -> list[str]:
        """Checksums that name what is kept of a graph; none where nothing is."""
        names = (graph.file, f"{graph.file}_data") if self._has_cache else ()
        return [self._files[name].sha256 for name in names if name in self._files]


class OnnxSession:
    """One graph in ONNX Runtime; see `Session`."""

    def __init__(self, session: ort.InferenceSession, graph: Graph, provider: str) -> None:
        self.graph, self.provider = graph, provider
        self._session = session
        self._names = [tensor.name for tensor in graph.outputs]

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        names = self._names if outputs is None else list(outputs)
        try:
            found: list[Any] = list(self._session.run(names, dict(feeds)))
        except Exception as error:
            raise RuntimeSettingError(
                f"{self.graph.file} could not be run ({_first_line(error)}); check the size asked "
                "for, or run `fewstep export check` on the folder"
            ) from error
        return dict(zip(names, found, strict=True))


def check_provider(provider: str) -> None:
    """Refuse an engine that is not there.

    Raises:
        RuntimeSettingError: The name is unknown, or this installation does not have it.
    """
    there = available_providers()
    if provider in there:
        return
    if provider not in PROVIDERS:
        raise RuntimeSettingError(
            f"provider {provider!r} is unknown; use auto, openvino, openvino-bf16, "
            f"tensorrt-native, {', '.join(PROVIDERS)}"
        )
    raise RuntimeSettingError(
        f"this installation of onnxruntime has no {provider} provider, only {', '.join(there)}; "
        'install "fewstep[runtime-gpu]" in place of "fewstep[runtime]", or use provider "cpu"'
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
