"""Writes the model repository: the pipeline model, and one model per graph it calls."""

import shutil
from pathlib import Path

from fewstep.errors import ExportError
from fewstep.export.tensorrt.sizes import text_length
from fewstep.export.triton.configs import Serving, component_config, pipeline_config
from fewstep.export.triton.pbtxt import Message, render
from fewstep.export.triton.scalars import copy_with_lifted_scalars
from fewstep.export.writing import whole_folder
from fewstep.recipe import SIDECAR_NAME
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import FILE, Graph, Manifest

FUSED = "fused"
PIPELINE = "pipeline"
"""Last part of the name of the model clients call. Not "fewstep": a folder of that name hides the
package in Triton's Python."""
CONFIG = "config.pbtxt"
VERSION = "1"
UNUSED = ("vae_encoder",)
"""Only image to image needs it, which the pipeline model does not offer."""
SOURCE = Path(__file__).with_name("pipeline_model.py")


def write_repository(
    folder: Path,
    out: Path,
    *,
    name: str = "fewstep",
    serving: Serving | None = None,
    is_fused: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write a repository Triton can serve.

    Args:
        folder: The export folder.
        out: The new repository; appears when everything in it is whole.
        name: Clients call NAME_pipeline, which calls NAME_transformer, ...
        serving: Device, batches and limits.
        is_fused: Whether the one fused graph is served in place of the components.
        overwrite: Whether a repository that is there is replaced.

    Returns:
        Names of the models.

    Raises:
        ExportError: The folder has no such graphs, a type Triton cannot carry, or `out` is taken.
        ExportFolderError: A file is missing, cut short or changed.
        RecipeError: The recipe is damaged or of a newer release.
        RuntimeSettingError: This release does not drive the family.
    """
    serving = serving or Serving()
    manifest = ExportFolder.open(folder, verify=True).manifest
    host_of(manifest.family)
    if manifest.makes_clips:
        raise ExportError(
            f"{folder} makes clips, and the model that clients call answers with pictures; draw it "
            "with `fewstep draw`"
        )
    components = _components(folder, manifest, is_fused)
    prefix, sizes = f"{name}_", usual_sizes(folder, manifest)
    with whole_folder(out, overwrite=overwrite) as partial:
        for component in components:
            model = partial / f"{prefix}{component}"
            graph = manifest.graphs[component]
            _write(model, component_config(model.name, graph, serving, sizes=sizes))
            _copy_graph(folder / graph.file, model / VERSION, graph)
        pipeline = partial / f"{prefix}{PIPELINE}"
        parameters = {"form": FUSED if is_fused else "components", "components": prefix}
        _write(pipeline, pipeline_config(pipeline.name, serving, parameters=parameters))
        shutil.copyfile(SOURCE, pipeline / VERSION / "model.py")
        _copy_companions(folder, manifest, pipeline / VERSION / "export")
    return [f"{prefix}{component}" for component in (PIPELINE, *components)]


def usual_sizes(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Symbol -> size at which the model was trained, for one picture; unknown ones are absent."""
    text = text_length(folder, manifest)
    sizes = {"batch_size": 1, "sequence_length": text, "step": 1}
    side = manifest.settings.get("sample_size")
    if side is not None:
        latents = ("height", "width", "latent_height", "latent_width")
        sizes |= dict.fromkeys(latents, int(side))
        patch = int(manifest.settings.get("patch_size", 2))
        sizes["packed_height_width"] = (int(side) // patch) ** 2
    return sizes


def _components(folder: Path, manifest: Manifest, is_fused: bool) -> list[str]:
    if is_fused and FUSED not in manifest.graphs:
        raise ExportError(f"{folder} has no fused graph; export with --fused, or leave --fused out")
    if is_fused:
        return [FUSED]
    return [name for name in manifest.graphs if name not in (FUSED, *UNUSED)]


def _write(model: Path, config: Message) -> None:
    (model / VERSION).mkdir(parents=True)
    (model / CONFIG).write_text(render(config), encoding="utf-8")


def _copy_graph(file: Path, target: Path, graph: Graph) -> None:
    if not file.is_file():
        raise ExportError(f"{file} is missing; export again")
    scalars = {tensor.name for tensor in graph.inputs if not tensor.dims}
    if scalars:
        copy_with_lifted_scalars(file, target / file.name, scalars)
    else:
        shutil.copyfile(file, target / file.name)
    data = file.with_name(f"{file.name}_data")
    if data.is_file():
        shutil.copyfile(data, target / data.name)


def _copy_companions(folder: Path, manifest: Manifest, target: Path) -> None:
    """Manifest, recipe, tokenizers and configurations: all but the graphs."""
    target.mkdir(parents=True)
    names = {FILE, SIDECAR_NAME, *manifest.files}
    for name in sorted(names):
        source = folder / name
        if ".onnx" in source.name or not source.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
