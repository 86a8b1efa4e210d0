"""Files of an export folder: graphs with one data file each, checksums, whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.part import Part, Port
from fewstep.runtime.export_folder import file_sha256
from fewstep.runtime.manifest import ElementType, Graph, Precision, StoredFile, Tensor

MODEL, DATA = "model.onnx", "model.onnx_data"
INLINE = 1024
"""Weights below this many bytes stay in the graph's own file."""
ELEMENT_TYPES: dict[ir.DataType, ElementType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` that takes its place when everything in it was written.

    Raises:
        ExportError: `out` has files in it and is not to be replaced, or the disk is full.
    """
    check_target(out, overwrite=overwrite)
    out = out.absolute()
    partial, old = (
        out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("partial", "old")
    )
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            os.replace(out, old)  # kept until the new one is in its place
        os.replace(partial, out)
    except OSError as error:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise ExportError(
            f"{out} could not be written ({error.strerror or error}); make room or choose another "
            "place, nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_target(out: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that holds something else, before the long work begins.

    Raises:
        ExportError: `out` is a file, or has files in it and is not to be replaced.
    """
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; name a folder with --out")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ExportError(
            f"{out} is not empty; name another folder, or replace it with --overwrite"
        )


def check_report(report: Path | None, out: Path) -> None:
    """Refuse a report inside the folder that is written: it would go when the new one comes.

    Args:
        report: File to write, if any.
        out: Folder that is replaced as a whole.

    Raises:
        ExportError: It is `out` or inside of it.
    """
    if report is not None and report.resolve().is_relative_to(out.resolve()):
        raise ExportError(
            f"--report {report} is inside --out {out}, which is replaced as a whole; name a file "
            "outside of it"
        )


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write model.onnx, and its large weights into one model.onnx_data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=INLINE)


def graph_entry(
    model: ir.Model, part: Part, *, precision: Precision, file: str | None = None
) -> Graph:
    """What the manifest says of a part's graph."""
    return Graph(
        file=file or f"{part.name}/{MODEL}",
        inputs=_tensors(list(model.graph.inputs), part.inputs),
        outputs=_tensors(list(model.graph.outputs), part.outputs),
        opset=model.opset_imports[""],  # the exporter's, whatever was asked for
        precision=precision,
        multiples=dict(part.multiples),
    )


def _tensors(values: list[ir.Value], ports: tuple[Port, ...]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=port.name, dtype=element_type(value), dims=port.dims)
        for value, port in zip(values, ports, strict=True)
    )


def element_type(value: ir.Value) -> ElementType:
    """Its element type, by the manifest's name.

    Raises:
        ExportError: It is none that hosts exchange.
    """
    if value.dtype is None or value.dtype not in ELEMENT_TYPES:
        raise ExportError(f"{value.name} has element type {value.dtype}, which no host exchanges")
    return ELEMENT_TYPES[value.dtype]


def stored_files(folder: Path) -> dict[str, StoredFile]:
    """Size and SHA-256 of every file of a folder but its manifest, by relative path."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != "manifest.json":
            found[name] = StoredFile(bytes=file.stat().st_size, sha256=file_sha256(file))
    return found
