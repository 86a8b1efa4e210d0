"""The whole check of a folder: kernels, overflow, parity and speed against what it replaces."""

import warnings
from dataclasses import dataclass, replace

from fewstep.export.checking.drawing import (
    MOST,
    Case,
    Drawing,
    another,
    cases_of,
    draw,
    drawer,
)
from fewstep.export.checking.findings import Findings, Pair
from fewstep.export.checking.fused_graph import FusedBeside
from fewstep.export.checking.inspecting import FUSED, Progress, as_typed, inspect
from fewstep.export.checking.limits import LIMITS, SLOWER, Limits, coarseness
from fewstep.export.checking.parity import (
    compare_component,
    compare_pictures,
    compare_steps,
    in_words,
    shape_of,
    stills,
)
from fewstep.export.checking.reference import (
    Reference,
    check_same_model,
    checksums,
    doubts_of,
    onnx_loader,
)
from fewstep.export.checking.speed import Times, compare_times
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Measured, Precision
from fewstep.runtime.session import Loader


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
    def components_there(self) -> tuple[str, ...]:
        """Every graph but the fused one."""
        return tuple(name for name in self.folder.manifest.graphs if name != FUSED)

    @property
    def changed(self) -> tuple[str, ...]:
        """Components whose graph is not byte for byte the reference's."""
        names, other = self.components_there, self.reference.folder
        if other is None:
            return names
        return tuple(n for n in names if checksums(self.folder, n) != checksums(other, n))

    @property
    def precision(self) -> Precision:
        """The coarsest of what changed: it says how near the pictures can be."""
        names = self.changed or self.components_there
        return max((self.precision_of(name) for name in names), key=coarseness)

    @property
    def own_precision(self) -> Precision:
        """The coarsest that the folder has, whether it changed or not."""
        graphs = self.folder.manifest.graphs
        return max((graphs[name].precision for name in self.components_there), key=coarseness)

    @property
    def limits(self) -> Limits:
        """Of pictures and latents."""
        return LIMITS[self.precision]

    def precision_of(self, name: str) -> Precision:
        """A component's own, or that of a float reference that is no better."""
        mine = self.folder.manifest.graphs[name].precision
        other = self._origin.manifest.graphs.get(name)
        is_finer = mine == "fp32" and other is not None and other.precision == "fp16"
        return "fp16" if is_finer else mine

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
        for name in self.changed:
            if name not in self._origin.manifest.graphs:
                continue
            self.progress(f"comparing {name}")
            sessions = (
                self.reference.loader.load(self._origin.manifest.graphs[name]),
                self.loader.load(self.folder.manifest.graphs[name]),
            )
            limit = LIMITS[self.precision_of(name)].component
            for case, (wanted, _) in zip(self.cases, drawings, strict=True):
                feeds = wanted.feeds_of(name)
                if feeds:
                    where = f"{case.name}, {shape_of(feeds[0])}"
                    found += compare_component(name, where, sessions, feeds, limit)
        return found

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
            feeds = wanted.feeds_of(name)
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
        mine = drawer(self.folder, self.loader, case)
        if own is None:
            return compare_times(
                "picture", where, drawer(self._origin, self.reference.loader, case), mine
            )
        return compare_times("picture", where, lambda i: own(another(case, i)), mine)


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
    mine = [drawing for _, drawing in drawings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut for every engine alike
        times = look.times(drawings[0][0])
        pixels, fused_times = _fused(look, mine, threads)
    times += fused_times
    measured = [
        *look.components(drawings),
        *(m for c, (a, b) in zip(cases, drawings, strict=True) for m in _steps(c, a, b, look)),
        *(m for pair in pairs for m in pair.measured),
        *pixels,
        *(m for one in times for m in one.measured(_time_limit(one, look))),
    ]
    problems, notes = inspect(folder, mine[0], progress)
    if len(prompts) > MOST:
        notes = (*notes, f"of {len(prompts)} prompts the first {MOST} were drawn")
    return Findings(
        label=f"this {look.own_precision} folder",
        reference=reference.label,
        measured=tuple(measured),
        problems=problems,
        doubts=doubts_of(folder, reference),
        notes=notes,
        pairs=tuple(pairs),
        times=tuple(times),
    )


def _fused(
    look: Examination, drawings: list[Drawing], threads: int
) -> tuple[list[Measured], list[Times]]:
    """The fused graph's figures, where there is one."""
    if FUSED not in look.folder.manifest.graphs:
        return [], []
    look.progress("comparing fused")
    whole = onnx_loader(look.folder, threads)  # its own: the graph's memory is given back
    beside = FusedBeside.load(look.folder, look.loader, whole)
    pixels = beside.pixels(look.cases, drawings)
    look.progress("timing fused")
    return pixels, [beside.times(look.cases[0])]


def _steps(case: Case, wanted: Drawing, found: Drawing, look: Examination) -> tuple[Measured, ...]:
    return compare_steps(case, wanted, found, look.limits)


def _time_limit(times: Times, look: Examination) -> float | None:
    """A folder replaces a pipeline as a whole; a graph replaces a graph, or its components."""
    is_graph = look.reference.folder is not None
    return SLOWER if times.what in ("picture", FUSED) or is_graph else None
