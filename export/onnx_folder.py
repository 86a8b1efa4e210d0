"""A pipeline becomes a folder: one ONNX graph per component, and all a host needs beside them."""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import ExportError
from fewstep.export.merging import MergedPipeline
from fewstep.export.optimising import make_graph
from fewstep.export.writing import graph_entry, save_graph, stored_files
from fewstep.pipeline.stock_scheduler import stock_scheduler
from fewstep.recipe import SIDECAR_NAME
from fewstep.runtime.manifest import FILE, FORMAT, MAJOR, Graph, Manifest

PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
OPSET = 18
"""The default: what ONNX Runtime's CPU kernels serve best (group norms stay instance norms)."""
OPSETS = range(18, 24)
"""From what torch's exporter is written in to what the oldest ONNX Runtime that draws knows."""
ORIGIN = ("_name_or_path", "name_or_path")
"""Entries of a configuration that say where it was loaded from."""
Progress = Callable[[str], None]


def write_folder(
    merged: MergedPipeline, folder: Path, *, opset: int, progress: Progress
) -> Manifest:
    """Write graphs, configurations, tokenizers, scheduler, recipe and manifest.

    Args:
        merged: The pipeline.
        folder: An empty folder.
        opset: Of the graphs.
        progress: Told the name of every component before it is exported.

    Raises:
        ExportError: The opset is none that is made, or a component cannot be exported.
    """
    check_opset(opset)
    graphs: dict[str, Graph] = {}
    for part in merged.parts():
        progress(part.name)
        model = make_graph(part, opset=opset)
        save_graph(model, folder / part.name)
        _write_json(folder / part.name / "config.json", without_origin(part.config))
        graphs[part.name] = graph_entry(
            model, part, precision="fp16" if part.dtype == torch.float16 else "fp32"
        )
    _write_companions(merged, folder)
    manifest = Manifest(
        format=f"{FORMAT}/{MAJOR}",
        family=merged.family.name,
        pipeline=type(merged.pipe).__name__,
        precision=merged.precision,
        graphs=graphs,
        experts=merged.expert_graphs,
        settings={k: float(v) for k, v in merged.family.settings(merged.pipe).items()},
        texts=merged.family.texts(merged.pipe),
        licence=merged.recipe.provenance.licence,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return write_manifest(folder, manifest)


def check_opset(opset: int) -> None:
    """Refuse an opset that the exporter would not make, or the runtime not run.

    Raises:
        ExportError: It is outside `OPSETS`.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"opset is {opset}; graphs are made in {OPSETS[0]} to {OPSETS[-1]}, name one of these"
        )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json last, with the checksum of every other file."""
    whole = dataclasses.replace(manifest, files=stored_files(folder))
    (folder / FILE).write_text(whole.to_json(), encoding="utf-8")
    return whole


def versions() -> dict[str, str]:
    """Versions of the packages that shaped the folder."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_companions(merged: MergedPipeline, folder: Path) -> None:
    pipe, recipe = merged.pipe, merged.recipe
    index: dict[str, Any] = {
        "_class_name": type(pipe).__name__,
        "_diffusers_version": version("diffusers"),
    }
    for name, component in pipe.components.items():
        if component is None:
            index[name] = [None, None]
            continue
        library = type(component).__module__.partition(".")[0]
        index[name] = [library, type(component).__name__]
        if name.startswith("tokenizer"):  # reads tokenizer.json in transformers 4 and 5 alike
            index[name] = ["transformers", "PreTrainedTokenizerFast"]
        if name.startswith(("tokenizer", "feature_extractor", "image_processor", "processor")):
            save_companion(component, folder / name)
    for name in ("safety_checker", "image_encoder", "feature_extractor"):
        if name in index:  # never part of an export
            index[name] = [None, None]
    stand_in = stock_scheduler(type(pipe).__name__, recipe, recipe.default_steps).scheduler
    scheduler = stand_in if stand_in is not None else pipe.scheduler
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    scheduler.save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", index)
    (folder / SIDECAR_NAME).write_text(recipe.to_json(indent=2) + "\n", encoding="utf-8")


def save_companion(component: Any, folder: Path) -> None:
    """A tokenizer or processor with its own writer.

    Raises:
        OSError: It could not be written; `tokenizers` itself says so in a plain Exception's text.
    """
    try:
        component.save_pretrained(folder)
    except Exception as error:
        found = re.fullmatch(r"(.+) \(os error (\d+)\)", str(error), re.DOTALL)
        if found is None:
            raise
        raise OSError(int(found[2]), found[1]) from error


def without_origin(config: Any) -> Any:
    """A configuration without the place it was loaded from, which is the exporting machine's."""
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if key not in ORIGIN}
        return {key: without_origin(value) for key, value in kept.items()}
    return config


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(dict(data), indent=2, sort_keys=True, default=str)
    path.write_text(text + "\n", encoding="utf-8")
