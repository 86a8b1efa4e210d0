"""A fused graph beside the components it was made from: the same pixels, in no more time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.export.checking.drawing import Case, Drawing, another, drawer
from fewstep.export.checking.parity import in_words
from fewstep.export.checking.speed import Times, compare_times
from fewstep.export.fused.verifying import pixels_apart
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime, fused_graph
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Measured
from fewstep.runtime.session import Loader


@dataclass(frozen=True, slots=True)
class FusedBeside:
    """Made by `load`.

    Attributes:
        folder: Holds both.
        components: Runs the components.
        fused: Draws with the fused graph.
        steps: Its step count.
        size: (height, width) of its pictures.
    """

    folder: ExportFolder
    components: Loader
    fused: FusedRuntime
    steps: int
    size: tuple[int, int]

    @staticmethod
    def load(folder: ExportFolder, components: Loader, whole: Loader) -> "FusedBeside":
        """Load the fused graph.

        Args:
            folder: Has one.
            components: Runs the components.
            whole: Runs the fused graph.

        Raises:
            ExportFolderError: It cannot be loaded.
        """
        graph = fused_graph(folder)
        height, width = (int(dim) for dim in graph.outputs[0].dims[1:3])
        steps = int(folder.manifest.settings.get("fused_steps", folder.recipe.default_steps))
        fused = FusedRuntime(folder, whole.load(graph))
        return FusedBeside(folder, components, fused, steps, (height, width))

    def pixels(self, cases: Sequence[Case], drawings: Sequence[Drawing]) -> list[Measured]:
        """The largest difference in each case of the graph's size.

        Args:
            cases: What was drawn.
            drawings: Of each case, by the components with the recipe's own step count.
        """
        found = []
        for case, drawing in zip(cases, drawings, strict=True):
            if case.size == self.size:
                pixels = self.fused(case.prompts, seed=case.seed).pixels
                where = f"{case.name}, {self._where(case)}"
                found.append(pixels_apart(where, self._wanted(case, drawing), pixels))
        return found

    def times(self, case: Case) -> Times:
        """Both in turns.

        Args:
            case: What is drawn, at the graph's size.
        """

        def whole(index: int) -> object:
            it = another(case, index)
            return self.fused(it.prompts, seed=it.seed)

        parts = drawer(self.folder, self.components, case, self.steps)
        return compare_times("fused", f"beside components, {self._where(case)}", parts, whole)

    def _wanted(self, case: Case, drawing: Drawing) -> np.ndarray:
        if self.steps == self.folder.recipe.default_steps:
            return drawing.pixels
        runtime = FewStepRuntime(self.folder, self.components, host_of(self.folder.manifest.family))
        return runtime(case.prompts, seed=case.seed, size=case.size, steps=self.steps).pixels

    def _where(self, case: Case) -> str:
        return f"{in_words(case)}, {self.steps} steps"
