"""The whole check of a folder: kernels, overflow, parity and speed against what it replaces."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fewstep.export.checking.drawing import Case, Drawing, cases_of, draw
from fewstep.export.checking.findings import Findings, Pair
from fewstep.export.checking.inspecting import Progress, as_typed, inspect
from fewstep.export.checking.limits import LIMITS, SLOWER, Limits
from fewstep.export.checking.parity import (
    compare_component,
    compare_pictures,
    compare_steps,
    in_words,
    stills,
)
from fewstep.export.checking.reference import Reference, check_same_model, onnx_loader
from fewstep.export.checking.speed import Times, compare_times
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Measured
from fewstep.runtime.session import Feeds, Loader


@dataclass(frozen=True, slots=True)
class Examination:
    """One check, made by `examine`.

    Attributes:
        folder: What is checked.
        loader: Runs its graphs.
        reference: What it is held against.
        cases: Pictures that are drawn.
        progress: Told what is being done.
    """

    folder: ExportFolder
    loader: Loader
    reference: Reference
    cases: tuple[Case, ...]
    progress: Progress

    @property
    def limits(self) -> Limits:
        """Of the folder's precision, or of a float reference that is no better."""
        mine, other = self.folder.manifest.precision, self.reference.folder
        if mine == "fp32" and other is not None and other.manifest.precision == "fp16":
            return LIMITS["fp16"]
        return LIMITS[mine]

    @property
    def changed(self) -> tuple[str, ...]:
        """Components whose graph is not byte for byte the reference's."""
        graphs = self.folder.manifest.graphs
        other = self.reference.folder
        names = [name for name in graphs if name != "fused"]
        if other is None:
            return tuple(names)
        return tuple(n for n in names if _sums(self.folder, n) != _sums(other, n))

    def drawings(self) -> list[tuple[Drawing, Drawing]]:
        """Reference and folder, for each case."""
        found = []
        for case in self.cases:
            self.progress(f"drawing: {case.name}")
            wanted = draw(self._origin, self.reference.loader, case)
            found.append((wanted, draw(self.folder, self.loader, case)))
        return found

    @property
    def _origin(self) -> ExportFolder:
        return self.reference.folder or self.folder

    def components(self, drawings: list[tuple[Drawing, Drawing]]) -> list[Measured]:
        """Every changed component on the reference's own inputs."""
        found: list[Measured] = []
        limit = self.limits.component
        for name in self.changed:
            if name not in self._origin.manifest.graphs:
                continue
            self.progress(f"comparing {name}")
            sessions = (
                self.reference.loader.load(self._origin.manifest.graphs[name]),
                self.loader.load(self.folder.manifest.graphs[name]),
            )
            for case, (wanted, _) in zip(self.cases, drawings, strict=True):
                feeds = self._feeds(name, wanted)
                if feeds:
                    where = f"{case.name}, {shape_of(feeds[0])}"
                    found += compare_component(name, where, sessions, feeds, limit)
        return found

    def _feeds(self, name: str, drawing: Drawing) -> list[Feeds]:
        if name != "vae_encoder":
            return drawing.feeds.get(name, [])
        pixels = drawing.pixels.astype(np.float32).transpose(0, 3, 1, 2)
        return [{"sample": pixels / np.float32(127.5) - np.float32(1.0)}]

    def pictures(self, drawings: list[tuple[Drawing, Drawing]]) -> list[Pair]:
        """Every case as the reference draws it and as the folder does."""
        found = []
        for case, (wanted, mine) in zip(self.cases, drawings, strict=True):
            own = self.reference.pictures
            pixels = wanted.pixels if own is None else own(case)
            measured = compare_pictures(case, pixels, mine.pixels, self.limits)
            each = tuple(p for p in case.prompts for _ in range(case.frames or 1))
            shown = replace(case, prompts=each)
            found.append(Pair(shown, stills(pixels), stills(mine.pixels), measured))
        return found

    def times(self, wanted: Drawing) -> list[Times]:
        """Changed components, then a whole picture; the first case, one picture alone."""
        found = []
        for name in self.changed:
            feeds = self._feeds(name, wanted)
            if name not in self._origin.manifest.graphs or not feeds:
                continue
            self.progress(f"timing {name}")
            first = self.reference.loader.load(self._origin.manifest.graphs[name])
            second = self.loader.load(self.folder.manifest.graphs[name])
            given = feeds[-1]
            mine = as_typed(given, second.graph)
            found.append(
                compare_times(
                    name,
                    shape_of(given),
                    lambda _, s=first, f=given: s.run(f),
                    lambda _, s=second, f=mine: s.run(f),
                )
            )
        self.progress("timing pictures")
        return [*found, self._picture_times()]

    def _picture_times(self) -> Times:
        case = self.cases[0]
        where = f"{in_words(case)}, {self.folder.recipe.default_steps} steps"
        own = self.reference.pictures
        mine = _drawer(self.folder, self.loader, case)
        if own is None:
            return compare_times(
                "picture", where, _drawer(self._origin, self.reference.loader, case), mine
            )
        return compare_times("picture", where, lambda i: own(_another(case, i)), mine)


def examine(
    folder: ExportFolder,
    reference: Reference,
    prompts: tuple[str, ...],
    *,
    threads: int = 0,
    progress: Progress = lambda what: None,
) -> Findings:
    """Check a folder against what it replaces.

    Args:
        folder: An export folder; it may not have its final name yet.
        reference: The pipeline or folder it was made from.
        prompts: Of the pictures that are compared; a few.
        threads: Of one network call; 0 takes ONNX Runtime's choice.
        progress: Told what is being done.

    Raises:
        ExportError: The two are not of one model.
        FewstepError: Either cannot be run.
    """
    if reference.folder is not None:
        check_same_model(folder, reference.folder)
    cases = cases_of(folder, prompts)
    look = Examination(folder, onnx_loader(folder, threads), reference, cases, progress)
    drawings = look.drawings()
    pairs = look.pictures(drawings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut for every engine alike
        times = look.times(drawings[0][0])
    measured = [
        *look.components(drawings),
        *(m for c, (a, b) in zip(cases, drawings, strict=True) for m in _steps(c, a, b, look)),
        *(m for pair in pairs for m in pair.measured),
        *(m for one in times for m in one.measured(_time_limit(one, look))),
    ]
    problems, notes = inspect(folder, drawings[0][1].feeds, progress)
    return Findings(
        label=f"this {folder.manifest.precision} folder",
        reference=reference.label,
        measured=tuple(measured),
        problems=problems,
        notes=notes,
        pairs=tuple(pairs),
        times=tuple(times),
    )


def _steps(case: Case, wanted: Drawing, found: Drawing, look: Examination) -> tuple[Measured, ...]:
    return compare_steps(case, wanted, found, look.limits)


def _time_limit(times: Times, look: Examination) -> float | None:
    """A folder replaces a pipeline as a whole; a graph replaces a graph."""
    is_graph = look.reference.folder is not None
    return SLOWER if times.what == "picture" or is_graph else None


def shape_of(feeds: Feeds) -> str:
    """The first input's shape, for people."""
    name, value = next(iter(feeds.items()))
    return f"{name} {'x'.join(str(n) for n in value.shape) or 'scalar'}"


def _drawer(folder: ExportFolder, loader: Loader, case: Case) -> Callable[[int], object]:
    runtime = FewStepRuntime(folder, loader, host_of(folder.manifest.family))

    def once(index: int) -> object:
        other = _another(case, index)
        return runtime(other.prompts, seed=other.seed, size=other.size, frames=other.frames)

    return once


def _another(case: Case, index: int) -> Case:
    """The same work with another text: a prompt that was seen before is not encoded again."""
    prompts = tuple(f"{prompt} {index}" for prompt in case.prompts)
    return replace(case, prompts=prompts, seed=case.seed + index)


def _sums(folder: ExportFolder, name: str) -> list[str]:
    graph = folder.manifest.graphs.get(name)
    if graph is None:
        return []
    files = folder.manifest.files
    names = (graph.file, f"{graph.file}_data")
    return [files[file].sha256 for file in names if file in files]
