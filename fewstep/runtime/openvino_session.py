"""Graphs on OpenVINO, which reads the same ONNX files."""

import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from openvino.op import Constant

from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.cache_folder import (
    cache_folder,
    clear_partials,
    key_of,
    machine,
    whole_file,
)
from fewstep.runtime.manifest import Graph, StoredFile
from fewstep.runtime.mapped_blob import MappedBlob
from fewstep.runtime.session import Feeds, Session

Arithmetic = Literal["f32", "bf16"]
"""Of every operator; the processor's own choice may be the quicker, which is another picture."""

NAMES: dict[Arithmetic, str] = {"f32": "openvino", "bf16": "openvino-bf16"}
"""As providers."""


class OpenVinoLoader:
    """Loads graphs with OpenVINO on the processor.

    Compiled graphs are kept for the next start, with weights in 16 bits for "bf16".

    Args:
        folder: The export folder.
        files: Checksums of its files, which name the compiled copies.
        arithmetic: "bf16" needs a processor that has it (Intel AMX, AVX-512 BF16): several times
            the speed, and pictures that are near those of float32, not the same.
        threads: Of one call; 0 takes OpenVINO's choice.
        has_cache: Whether compiled graphs are kept.

    Raises:
        RuntimeSettingError: The processor has no such arithmetic.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, StoredFile],
        arithmetic: Arithmetic = "f32",
        *,
        threads: int = 0,
        has_cache: bool = True,
    ) -> None:
        self.name = NAMES[arithmetic]
        self._folder, self._files, self._has_cache = folder, files, has_cache
        self._core, self._arithmetic = ov.Core(), arithmetic
        if arithmetic == "bf16" and "BF16" not in capabilities(self._core):
            raise RuntimeSettingError(
                f"provider {self.name} was asked for, and this processor has no bfloat16 "
                "arithmetic (Intel AMX or AVX-512 BF16); use provider openvino"
            )
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": arithmetic,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._settings["INFERENCE_NUM_THREADS"] = threads

    def load(self, graph: Graph) -> Session:
        """Compile one graph, or take its compiled copy.

        Raises:
            ExportFolderError: The file is missing, or OpenVINO cannot read it.
        """
        file = self._folder / graph.file
        if not file.is_file():
            raise ExportFolderError(f"{file} is missing; export again, or copy the whole folder")
        kept = self._kept(graph)
        session = None if kept is None else self._imported(kept, graph)
        if session is None and kept is not None:
            self._keep(file, kept)
            session = self._imported(kept, graph)
        return session or OpenVinoSession(self._compiled(file), graph, self.name)

    def _imported(self, kept: Path, graph: Graph) -> Session | None:
        """From the compiled copy; None where there is none, or it is damaged."""
        try:
            blob = MappedBlob(kept)
            tensor = ov.Tensor(blob.values, shared_memory=True)
            compiled = self._core.import_model(tensor, "CPU", self._settings)
        except (OSError, ValueError, RuntimeError):  # a cache: it is made again
            with suppress(OSError):
                kept.unlink(missing_ok=True)
            return None
        return OpenVinoSession(compiled, graph, self.name, blob)

    def _keep(self, file: Path, kept: Path) -> None:
        """Write the compiled copy; a full disk or a read-only home leaves none."""
        try:
            clear_partials(kept.parent)
            with whole_file(kept) as partial:
                model = self._narrowed(file, partial) if self._arithmetic == "bf16" else file
                stream = self._compiled(model).export_model()
                with partial.open("wb") as target:
                    target.write(stream.getbuffer())
        except (OSError, RuntimeError):
            return

    def _narrowed(self, file: Path, partial: Path) -> Any:
        """The graph with weights in 16 bits: half to read, and bfloat16 keeps fewer digits."""
        whole = self._core.read_model(str(file))
        exact = {op.get_friendly_name(): op for op in whole.get_ops()}
        with tempfile.TemporaryDirectory(".partial", ".", partial.parent) as folder:
            narrow = Path(folder) / "model.xml"
            ov.save_model(whole, str(narrow), compress_to_fp16=True)
            # not mapped: the file is gone when the block is left
            model = self._core.read_model(str(narrow), config={"ENABLE_MMAP": False})
        for constant in model.get_ops():
            if constant.get_type_name() == "Constant" and _is_half(constant):
                _make_bfloat16(constant, exact)
        return model

    def _compiled(self, model: Any) -> Any:
        given = str(model) if isinstance(model, Path) else model
        try:
            return self._core.compile_model(given, "CPU", self._settings)
        except RuntimeError as error:
            raise ExportFolderError(
                f"OpenVINO cannot load {model} ({_first_line(error)}); use provider cpu"
            ) from error

    def _kept(self, graph: Graph) -> Path | None:
        """Where this graph's compiled copy lies; None where none is kept."""
        names = (graph.file, f"{graph.file}_data")
        sums = [self._files[name].sha256 for name in names if name in self._files]
        if not sums or not self._has_cache:
            return None
        key = key_of(sums, ov.__version__, self._settings, machine())
        return cache_folder() / "openvino" / f"{key}.blob"


def capabilities(core: Any) -> list[str]:
    """What the processor has, by OpenVINO's names ("FP32", "BF16", "INT8", ...)."""
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVinoSession:
    """One graph in OpenVINO; see `Session`. Each thread has a request of its own."""

    def __init__(
        self, compiled: Any, graph: Graph, provider: str, blob: MappedBlob | None = None
    ) -> None:
        self.graph, self.provider = graph, provider
        self._compiled, self._local = compiled, threading.local()
        self._blob, self._is_copied = blob, blob is None

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `Session.run`; every output is computed."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        try:
            with self._copying():  # the first call arranges the weights
                request = self._local.request
                found = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise RuntimeSettingError(
                f"{self.graph.file} could not be run ({_first_line(error)}); check the size"
            ) from error
        names = [tensor.name for tensor in self.graph.outputs]
        values = dict(zip(names, found.values(), strict=True))
        return {name: values[name] for name in (outputs or names)}

    def _copying(self) -> AbstractContextManager[None]:
        if self._is_copied or self._blob is None:
            return nullcontext()
        self._is_copied = True
        return self._blob.passing()


def _is_half(constant: Any) -> bool:
    return constant.get_output_element_type(0) == ov.Type.f16


def _make_bfloat16(constant: Any, exact: Mapping[str, Any]) -> None:
    """In the engine's own type a weight need not be converted at every start.

    What is no matrix stays float32: the frequencies of a time embedding are multiplied by up to
    1000, and with a bfloat16's digits the network would be told another time.
    """
    name = constant.get_friendly_name()
    whole = exact.get(name.removesuffix("_compressed"))
    is_matrix = sum(size > 1 for size in constant.get_output_shape(0)) > 1
    if is_matrix or whole is None:
        values = bfloat16_bits(constant.get_data())
        made = Constant(ov.Tensor(values, values.shape, ov.Type.bf16), shared_memory=False)
    else:
        made = Constant(ov.Tensor(np.array(whole.get_data(), np.float32)), shared_memory=False)
    made.set_friendly_name(name)
    for user in constant.output(0).get_target_inputs():
        user.replace_source_output(made.output(0))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Finite numbers rounded to the nearest bfloat16, ties to even, as uint16 of the same shape."""
    wide = np.array(values, np.float32, order="C", ndmin=1)
    bits = wide.view(np.uint32)
    odd = (bits >> 16) & 1
    bits += odd
    bits += 0x7FFF
    high = 1 if sys.byteorder == "little" else 0
    return wide.view(np.uint16)[..., high::2].reshape(np.shape(values)).copy()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
