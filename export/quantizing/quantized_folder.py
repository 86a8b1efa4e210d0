"""An export folder becomes another one whose networks are in fewer bits."""

import dataclasses
import datetime
import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from fewstep.errors import ExportError
from fewstep.export.checking.reference import onnx_loader
from fewstep.export.onnx_folder import versions, write_manifest
from fewstep.export.quantizing.layers import Layer, layers_of, load_graph, replace_weights, without
from fewstep.export.quantizing.plan import Plan, Result
from fewstep.export.quantizing.schemes import Scheme
from fewstep.export.quantizing.sensitivities import Sensitivities
from fewstep.export.quantizing.sensitivity import measure_sensitivity
from fewstep.export.quantizing.skipping import Skips
from fewstep.export.quantizing.trajectories import record
from fewstep.export.writing import DATA, MODEL, save_graph
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import FILE, Graph, Manifest
from fewstep.runtime.session import Feeds

RECORD = "quantization.json"
"""Beside the manifest: settings, layers that stayed float, sensitivities."""
FUSED = "fused"


def open_float_folder(root: Path) -> ExportFolder:
    """The folder to start from, every checksum compared.

    Raises:
        ExportFolderError: It is damaged or of another release.
        ExportError: It is not in float32.
    """
    folder = ExportFolder.open(root, verify=True)
    if folder.manifest.precision != "fp32":
        raise ExportError(
            f"{root} is in {folder.manifest.precision}; quantize an fp32 folder "
            "(`fewstep export onnx --precision fp32`)"
        )
    return folder


def chosen_components(folder: ExportFolder, names: Sequence[str]) -> tuple[str, ...]:
    """Graphs to quantize; none named means the denoisers.

    Raises:
        ExportError: The folder has no such graph.
    """
    host = host_of(folder.manifest.family)
    chosen = tuple(names) or folder.manifest.experts or (host.denoiser,)
    there = [name for name in folder.manifest.graphs if name != FUSED]
    for name in chosen:
        if name not in there:
            raise ExportError(f"the folder has no {name!r}; --components may name {there}")
    return chosen


def quantize_into(
    source: ExportFolder, folder: Path, plan: Plan, *, progress: Callable[[str], None]
) -> tuple[Manifest, tuple[Result, ...]]:
    """Write the quantized folder.

    Args:
        source: From `open_float_folder`.
        folder: Empty; it is not complete before this returns.
        plan: What is to be done.
        progress: Told what is being done.

    Raises:
        ExportError: Nothing is left to quantize, or a quantizer refuses the graph.
    """
    feeds: dict[str, list[Feeds]] = {}
    if plan.scheme.needs_feeds or plan.skips.needs_sensitivity:
        progress("recording trajectories")
        feeds = record(source, onnx_loader(source, plan.threads), plan.prompts)
    _copy_companions(source, folder, plan.components)
    results = []
    for name in plan.components:
        progress(f"quantizing {name}")
        results.append(_quantize_one(source, folder, name, plan, feeds.get(name, []), progress))
    _write_record(folder, plan, results)
    return write_manifest(folder, _manifest(source, plan, results)), tuple(results)


def _quantize_one(
    source: ExportFolder,
    folder: Path,
    name: str,
    plan: Plan,
    feeds: list[Feeds],
    progress: Callable[[str], None],
) -> Result:
    graph, scheme = source.manifest.graphs[name], plan.scheme
    model = load_graph(source.root / graph.file)
    scheme.prepare(model)
    if plan.distilled is not None:
        replace_weights(model, plan.distilled.weights.get(name, {}))
    every = layers_of(model, scheme.kinds)
    if not every:
        raise ExportError(f"{name} has no layer that {scheme.precision} could write in fewer bits")
    chosen = without(every, plan.skips.patterns)
    found = None
    if plan.skips.needs_sensitivity:
        found = measure_sensitivity(
            model, graph, scheme, chosen, feeds, skips=plan.skips, progress=progress
        )
        chosen = _less_sensitive(chosen, found, plan.skips)
    work = folder / ".work"
    work.mkdir()
    ir.save(model, work / "source.onnx", external_data="source.onnx_data")
    _quantize(scheme, work, chosen, feeds)
    made = ir.load(work / "target.onnx")
    names = {layer.name for layer in chosen if not _is_float(made, layer)}
    _save(made, folder / name)
    shutil.rmtree(work)
    return Result(
        name=name,
        opset=made.opset_imports[""],
        quantized=tuple(dict.fromkeys(x.name for x in every if x.name in names)),
        skipped=tuple(dict.fromkeys(x.name for x in every if x.name not in names)),
        bytes_before=stored_bytes(source.root / name),
        bytes_after=stored_bytes(folder / name),
        sensitivities=found,
    )


def _quantize(scheme: Scheme, work: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]) -> None:
    try:
        scheme.quantize(work / "source.onnx", work / "target.onnx", layers, feeds)
    except DecodeError as error:  # onnx's shape inference does not see that its write fell short
        raise OSError(errno.ENOSPC, "a graph was cut short, as on a full disk") from error


def _is_float(model: ir.Model, layer: Layer) -> bool:
    """Whether a quantizer left a layer as it was: some have rules of their own."""
    held = model.graph.initializers.get(layer.weight)
    return held is not None and held.dtype == ir.DataType.FLOAT


def _less_sensitive(
    layers: tuple[Layer, ...], found: Sensitivities, skips: Skips
) -> tuple[Layer, ...]:
    names = set(found.chosen(skips))
    kept = tuple(layer for layer in layers if layer.name not in names)
    if not kept:
        raise ExportError(
            f"--skip leaves none of {len(layers)} layers to quantize: all of them together cost "
            f"{found.whole:.3g}; allow more, or use a precision with more bits"
        )
    return kept


def _save(model: ir.Model, folder: Path) -> None:
    """The quantizers' notes dropped; inner shapes too, which hosts work out again."""
    from fewstep import __version__

    model.metadata_props.clear()
    model.producer_name, model.producer_version = "fewstep", __version__
    kept = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            if output not in kept:
                output.shape = None
    save_graph(model, folder)


def _copy_companions(source: ExportFolder, folder: Path, components: Sequence[str]) -> None:
    for name in source.manifest.files:
        place = Path(name)
        is_new = place.parts[0] in components and place.name in (MODEL, DATA)
        if is_new or place.parts[0] == FUSED or name in (FILE, RECORD):
            continue  # a fused graph has the float weights: it would not be this model
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.root / place, target)


def _manifest(source: ExportFolder, plan: Plan, results: Sequence[Result]) -> Manifest:
    known, precision = source.manifest, plan.scheme.precision
    graphs: dict[str, Graph] = {name: g for name, g in known.graphs.items() if name != FUSED}
    for one in results:
        changed = dataclasses.replace(graphs[one.name], precision=precision, opset=one.opset)
        graphs[one.name] = changed
    denoisers = chosen_components(source, ())
    return dataclasses.replace(
        known,
        graphs=graphs,
        settings={k: v for k, v in known.settings.items() if k != f"{FUSED}_steps"},
        precision=precision if set(denoisers) & set(plan.components) else known.precision,
        measured=(),
        verified=False,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _write_record(folder: Path, plan: Plan, results: Sequence[Result]) -> None:
    told = {
        "precision": plan.scheme.precision,
        **plan.scheme.notes,
        "distilled": plan.distilled and plan.distilled.as_json(),
        "components": [result.as_json() for result in results],
    }
    (folder / RECORD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def stored_bytes(folder: Path) -> int:
    """Of a component's graph and weights."""
    return sum(file.stat().st_size for file in folder.glob(f"{MODEL}*"))
