"""What an export folder is held against: the pipeline it was made from, or another folder."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.errors import ExportError
from fewstep.export.checking.drawing import Case
from fewstep.export.checking.limits import coarseness
from fewstep.export.checking.recording import KeepingLoader
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.onnx_session import OnnxLoader
from fewstep.runtime.session import Loader

if TYPE_CHECKING:  # it brings torch and diffusers, which a folder needs none of
    from fewstep.export.merging import MergedPipeline

Pictures = Callable[[Case], np.ndarray]


@dataclass(frozen=True, slots=True)
class Reference:
    """The thing that is replaced.

    Attributes:
        label: For people.
        loader: Runs its networks.
        pictures: Draws a case by its own means; None where the runtime's loop is its means.
        folder: Where its graphs are; None for a pipeline.
    """

    label: str
    loader: Loader
    pictures: Pictures | None = None
    folder: ExportFolder | None = None


def onnx_loader(folder: ExportFolder, threads: int = 0) -> Loader:
    """ONNX Runtime on the processor, nothing cached: what is measured is what is in the folder."""
    files = folder.manifest.files
    return KeepingLoader(OnnxLoader(folder.root, files, threads=threads, has_cache=False))


def folder_reference(root: Path, *, threads: int = 0) -> Reference:
    """Another export folder.

    Raises:
        ExportFolderError: It is damaged, a checksum differs, or it is of another release.
    """
    folder = ExportFolder.open(root, verify=True)  # what is damaged is no measure of anything
    label = f"{root.name} ({folder.manifest.precision})"
    return Reference(label, onnx_loader(folder, threads), folder=folder)


def pipeline_reference(
    base: str | Path, adapter: str | Path | None, recipe: str | Path | None = None
) -> Reference:
    """The torch pipeline of a base and an adapter, merged.

    Raises:
        FewstepError: It cannot be loaded.
    """
    from fewstep.export.merging import load_merged

    return merged_reference(load_merged(base, adapter, recipe))


def merged_reference(merged: "MergedPipeline") -> Reference:
    """The torch pipeline that was exported; pictures come from FewStepPipeline itself."""
    from fewstep.export.checking.torch_engine import TorchLoader
    from fewstep.pipeline import FewStepPipeline

    if merged.experts:
        return _experts_reference(merged)

    def pictures(case: Case) -> np.ndarray:
        pipe = FewStepPipeline.wrap(merged.pipe, recipe=merged.recipe, probe=False)
        try:
            return _drawn(pipe, case)
        finally:
            pipe.unwrap()

    parts = merged.family.parts(merged.pipe)
    return Reference("torch", KeepingLoader(TorchLoader(parts)), pictures=pictures)


def _experts_reference(merged: "MergedPipeline") -> Reference:
    """The pipeline with its experts unmerged, which stays wrapped: one network serves them all."""
    from fewstep.export.checking.torch_engine import TorchLoader
    from fewstep.export.experts import wrapped_experts

    pipe: Any = wrapped_experts(merged.pipe, merged.experts, merged.recipe)
    name = merged.family.denoiser
    if merged.precision == "fp16":
        pipe.components[name].to(merged.dtype)
    switch = pipe._fewstep.experts
    parts = {part.name: part for part in merged.family.parts(pipe)}
    parts |= {e.graph: replace(parts[name], name=e.graph) for e in merged.experts}
    prepare = {e.graph: partial(switch.turn_to, i) for i, e in enumerate(merged.experts)}
    loader = TorchLoader(tuple(parts.values()), prepare)
    return Reference("torch", KeepingLoader(loader), pictures=partial(_drawn, pipe))


def _drawn(pipe: Any, case: Case) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    height, width = case.size
    call = partial(pipe, list(case.prompts), seed=case.seed, height=height, width=width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut for every engine alike
        if case.frames is None:
            return np.stack([np.asarray(image) for image in call().images])
        found = call(num_frames=case.frames, output_type="pil")
    return np.stack([[np.asarray(image) for image in clip] for clip in found.frames])


def check_not_itself(candidate: Path, reference: Path) -> None:
    """Refuse to hold a folder against itself.

    Raises:
        ExportError: They are one folder.
    """
    if candidate.exists() and reference.exists() and candidate.samefile(reference):
        raise ExportError(
            f"{reference} was given as its own reference, which it always equals; name the folder "
            "it was made from with --against, or its pipeline with --base"
        )


def doubts_of(candidate: ExportFolder, reference: Reference) -> tuple[str, ...]:
    """Why a folder that equals its reference is not verified by that.

    Args:
        candidate: The folder that is checked.
        reference: A pipeline is above all doubt, a folder is not.
    """
    if reference.folder is None:
        return ()
    theirs, found = reference.folder.manifest, []
    if not theirs.verified:
        found.append(
            f"not called verified: its reference {reference.label} is not verified itself; check "
            "that first, or use --base"
        )
    for name, graph in candidate.manifest.graphs.items():
        other = theirs.graphs.get(name)
        if name == "fused":
            continue  # it is held against the candidate's own components
        if other is None:
            found.append(f"not called verified: the reference has no {name}")
        elif coarseness(other.precision) > coarseness(graph.precision):
            found.append(
                f"not called verified: the reference's {name} is in {other.precision}, coarser "
                f"than {graph.precision}; name a finer folder, or use --base"
            )
    return tuple(found)


def check_same_model(candidate: ExportFolder, reference: ExportFolder) -> None:
    """Refuse to compare folders of different models.

    Raises:
        ExportError: Families or recipes differ.
    """
    if candidate.manifest.family != reference.manifest.family:
        raise ExportError(
            f"{candidate.root} holds a {candidate.manifest.family} model and {reference.root} a "
            f"{reference.manifest.family} one; compare folders of one model"
        )
    if candidate.recipe.grids != reference.recipe.grids:
        raise ExportError(
            f"{candidate.root} and {reference.root} are sampled by different recipes; compare "
            "folders of one model"
        )


def checksums(folder: ExportFolder, name: str) -> list[str]:
    """Of a graph's files, as the manifest has them; empty where there is no such graph."""
    graph = folder.manifest.graphs.get(name)
    if graph is None:
        return []
    files = folder.manifest.files
    names = (graph.file, f"{graph.file}_data")
    return [files[file].sha256 for file in names if file in files]
