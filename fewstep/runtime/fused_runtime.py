"""FusedRuntime: the one-graph form of an export folder. One call of the engine per batch.

Fixed at export: step count and size. What it draws is what FewStepRuntime draws, pixel by pixel.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewstep.errors import RuntimeSettingError
from fewstep.noise import NoiseBatch
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.host import Size
from fewstep.runtime.manifest import Graph
from fewstep.runtime.output import RuntimeOutput
from fewstep.runtime.providers import make_loader
from fewstep.runtime.request import make_request
from fewstep.runtime.session import Session

NAME = "fused"


class FusedRuntime:
    """The whole pipeline as one graph; made by `load`. Calls are safe from several threads."""

    def __init__(self, folder: ExportFolder, session: Session) -> None:
        self.folder, self._session = folder, session

    @classmethod
    def load(
        cls, folder: str | Path, *, provider: str = "cpu", threads: int = 0, has_cache: bool = True
    ) -> "FusedRuntime":
        """Open a folder that was exported with --fused.

        Args:
            folder: The export folder.
            provider: As `FewStepRuntime.load`.
            threads: Of the call; 0 takes the engine's choice.
            has_cache: Whether the optimised graph is kept for the next start.

        Raises:
            ExportFolderError: The folder is damaged.
            RuntimeSettingError: It has no fused graph.
        """
        opened = ExportFolder.open(folder)
        graph = fused_graph(opened)
        loader = make_loader(opened, provider, threads=threads, has_cache=has_cache)
        return cls(opened, loader.load(graph))

    def __call__(
        self, prompt: str | Sequence[str], *, seed: int | Sequence[int] = 0, num_images: int = 1
    ) -> RuntimeOutput:
        """Draw; see `FewStepRuntime.__call__`."""
        height, width = self._session.graph.outputs[0].dims[1:3]
        request = make_request(
            prompt,
            None,
            seed=seed,
            steps=None,
            size=Size(int(height), int(width)),
            num_images=num_images,
        )
        graph = self._session.graph
        feeds = fused_feeds(self.folder, graph, request.prompts, request.seeds)
        return RuntimeOutput(self._session.run(feeds)["images"], request.seeds)


def fused_feeds(
    folder: ExportFolder, graph: Graph, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Inputs of a fused graph: token ids of each text encoder, and every draw of noise.

    Args:
        folder: Its tokenizers.
        graph: Says the lengths and the number of draws.
        prompts: One per picture.
        seeds: Likewise.
    """
    feeds = {}
    for tensor in graph.inputs:
        shape = [int(dim) for dim in tensor.dims[1:]]
        if tensor.name == "noise":
            stream = NoiseBatch(seeds)
            feeds[tensor.name] = np.stack([stream.draw(shape[1:]) for _ in range(shape[0])], 1)
        else:
            name = tensor.name.replace("input_ids", "tokenizer")
            feeds[tensor.name] = folder.tokenizer(name).encode(list(prompts), shape[0])
    return feeds


def fused_graph(folder: ExportFolder) -> Graph:
    """The fused graph of a folder.

    Raises:
        RuntimeSettingError: It was exported without one, or is quantized.
    """
    graph, precision = folder.manifest.graphs.get(NAME), folder.manifest.precision
    if graph is None and precision not in ("fp32", "fp16"):
        raise RuntimeSettingError(
            f"{folder.root} is in {precision} and has no fused graph; quantize with --fused "
            "(int8), or use FewStepRuntime"
        )
    if graph is None:
        raise RuntimeSettingError(
            f"{folder.root} has no fused graph; export with --fused, or use FewStepRuntime"
        )
    return graph
