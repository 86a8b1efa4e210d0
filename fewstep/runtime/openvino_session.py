"""Graphs on OpenVINO, which reads the same ONNX files."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov

from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.cache_folder import cache_folder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds, Session

Arithmetic = Literal["f32", "bf16"]
"""Of every operator; the processor's own choice may be the quicker, which is another picture."""

NAMES: dict[Arithmetic, str] = {"f32": "openvino", "bf16": "openvino-bf16"}
"""As providers."""


class OpenVinoLoader:
    """Loads graphs with OpenVINO on the processor.

    Args:
        folder: The export folder.
        arithmetic: "bf16" needs a processor that has it (Intel AMX, AVX-512 BF16): several times
            the speed, and pictures that are near those of float32, not the same.
        threads: Of one call; 0 takes OpenVINO's choice.
        has_cache: Whether compiled graphs are kept for the next start.

    Raises:
        RuntimeSettingError: The processor has no such arithmetic.
    """

    def __init__(
        self,
        folder: Path,
        arithmetic: Arithmetic = "f32",
        *,
        threads: int = 0,
        has_cache: bool = True,
    ) -> None:
        self.name = NAMES[arithmetic]
        self._folder = folder
        self._core = ov.Core()
        if arithmetic == "bf16" and "BF16" not in capabilities(self._core):
            raise RuntimeSettingError(
                f"provider {self.name} was asked for, and this processor has no bfloat16 "
                "arithmetic (Intel AMX or AVX-512 BF16); use provider openvino"
            )
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": arithmetic,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        kept = cache_folder() / "openvino"
        if has_cache:
            with suppress(OSError):  # a read-only home: graphs are compiled at every start
                kept.mkdir(parents=True, exist_ok=True)
                settings["CACHE_DIR"] = str(kept)
        self._settings = settings

    def load(self, graph: Graph) -> Session:
        """Compile one graph.

        Raises:
            ExportFolderError: The file is missing, or OpenVINO cannot read it.
        """
        file = self._folder / graph.file
        if not file.is_file():
            raise ExportFolderError(f"{file} is missing; export again, or copy the whole folder")
        try:
            compiled = self._core.compile_model(str(file), "CPU", self._settings)
        except RuntimeError as error:
            raise ExportFolderError(
                f"OpenVINO cannot load {file} ({_first_line(error)}); use provider cpu"
            ) from error
        return OpenVinoSession(compiled, graph, self.name)


def capabilities(core: Any) -> list[str]:
    """What the processor has, by OpenVINO's names ("FP32", "BF16", "INT8", ...)."""
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVinoSession:
    """One graph in OpenVINO; see `Session`. Each thread has a request of its own."""

    def __init__(self, compiled: Any, graph: Graph, provider: str) -> None:
        self.graph, self.provider = graph, provider
        self._compiled, self._local = compiled, threading.local()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`; every output is computed."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        try:
            found = self._local.request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise RuntimeSettingError(
                f"{self.graph.file} could not be run ({_first_line(error)}); check the size"
            ) from error
        names = [tensor.name for tensor in self.graph.outputs]
        values = dict(zip(names, found.values(), strict=True))
        return {name: values[name] for name in (outputs or names)}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
