"""The pipeline as a model of Triton's Python backend; copied into the repository as 1/model.py.

Tokenises, runs the recipe's loop and decodes with fewstep.runtime; every network call is a request
to a component model of the same repository. Needs fewstep (without extras) in Triton's Python.
"""

import importlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import FewstepError, RuntimeSettingError
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime, fused_graph
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Graph, read_manifest

logger = logging.getLogger(__name__)

SEED_RANGE = 1 << 31


def triton() -> Any:
    """The module that exists inside Triton only."""
    return importlib.import_module("triton_python_backend_utils")


@dataclass(slots=True)
class ComponentSession:
    """A component model of the repository, called as a session of the runtime.

    Attributes:
        graph: Its manifest entry.
        provider: "triton".
        model: Its name in the repository.
    """

    graph: Graph
    provider: str
    model: str

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """One request; answers are copied, as they lie in the component's memory."""
        utils = triton()
        scalars = {tensor.name for tensor in self.graph.inputs if not tensor.dims}
        inputs = [
            utils.Tensor(name, value.reshape(1) if name in scalars else np.ascontiguousarray(value))
            for name, value in feeds.items()
        ]
        wanted = list(outputs or [tensor.name for tensor in self.graph.outputs])
        answer = utils.InferenceRequest(
            model_name=self.model, requested_output_names=wanted, inputs=inputs
        ).exec()
        if answer.has_error():
            raise RuntimeSettingError(f"{self.model} failed: {answer.error().message()}")
        found = {name: utils.get_output_tensor_by_name(answer, name) for name in wanted}
        return {name: np.array(tensor.as_numpy()) for name, tensor in found.items()}


@dataclass(slots=True)
class ComponentLoader:
    """Finds the component models.

    Attributes:
        name: "triton".
        models: Graph file -> model.
    """

    name: str
    models: Mapping[str, str]

    def load(self, graph: Graph) -> ComponentSession:
        """Nothing is loaded here: Triton has it."""
        return ComponentSession(graph, self.name, self.models[graph.file])


@dataclass(frozen=True, slots=True)
class Asked:
    """One picture of one request."""

    prompt: str
    negative: str | None
    seed: int
    steps: int | None
    size: tuple[int, int] | None


Place = tuple[int, int]
"""Request, and row of its batch."""
Outcome = np.ndarray | str
"""A picture, or why there is none."""


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read recipe, manifest and tokenizers; they lie beside this file.

        Args:
            args: From Triton: the folder, the version, config.pbtxt as JSON.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        home = Path(args["model_repository"]) / args["model_version"] / "export"
        manifest = read_manifest(home)
        recipe = FewStepRecipe.from_file(home / SIDECAR_NAME)
        folder = ExportFolder(home, manifest, recipe)
        prefix = parameters["components"]["string_value"]
        models = {graph.file: f"{prefix}{name}" for name, graph in manifest.graphs.items()}
        loader = ComponentLoader("triton", models)
        self._fused: FusedRuntime | None = None
        self._runtime: FewStepRuntime | None = None
        if parameters["form"]["string_value"] == "fused":
            self._fused = FusedRuntime(folder, loader.load(fused_graph(folder)))
        else:
            self._runtime = FewStepRuntime(folder, loader, host_of(manifest.family))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw a batch: pictures of one size and step count go through the loop together.

        Where they cannot be drawn together, each request is drawn alone, so that one that asks for
        the impossible fails by itself.
        """
        asked = [_asked(request) for request in requests]
        outcomes: dict[Place, Outcome] = {}
        for places in _groups(asked):
            outcomes |= self._drawn(asked, places)
        return [
            _answer(rows, [outcomes[number, row] for row in range(len(rows))])
            for number, rows in enumerate(asked)
        ]

    def _drawn(self, asked: list[list[Asked]], places: list[Place]) -> dict[Place, Outcome]:
        try:
            pictures = self._draw([asked[number][row] for number, row in places])
        except Exception as error:  # of whatever kind: it must not reach the neighbours
            requests = sorted({number for number, _ in places})
            if len(requests) == 1:
                return dict.fromkeys(places, _sentence(error))
            outcomes: dict[Place, Outcome] = {}
            for request in requests:
                own = [place for place in places if place[0] == request]
                outcomes |= self._drawn(asked, own)
            return outcomes
        return dict(zip(places, pictures, strict=True))

    def _draw(self, rows: list[Asked]) -> np.ndarray:
        prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
        first = rows[0]
        if self._fused is not None:
            if first.steps is not None or first.size is not None or first.negative is not None:
                raise RuntimeSettingError(
                    "steps, size and negative_prompt were given and the fused graph has them built "
                    "in; leave them out, or serve the components"
                )
            return self._fused(prompts, seed=seeds).pixels
        assert self._runtime is not None
        negative = None if first.negative is None else [row.negative or "" for row in rows]
        drawn = self._runtime(prompts, negative, seed=seeds, steps=first.steps, size=first.size)
        return drawn.pixels


def _groups(asked: list[list[Asked]]) -> list[list[Place]]:
    """Places of pictures that can go through the loop together."""
    groups: dict[tuple[Any, ...], list[Place]] = {}
    for number, rows in enumerate(asked):
        for row, one in enumerate(rows):
            key = (one.size, one.steps, one.negative is None)
            groups.setdefault(key, []).append((number, row))
    return list(groups.values())


def _asked(request: Any) -> list[Asked]:
    prompts = _texts(request, "prompt") or []
    count = len(prompts)
    negatives = _texts(request, "negative_prompt") or [None] * count
    seeds, steps, sizes = (_numbers(request, name, count) for name in ("seed", "steps", "size"))
    rows = []
    for at in range(count):
        seed = int(seeds[at][0]) if seeds is not None else secrets.randbelow(SEED_RANGE)
        rows.append(
            Asked(
                prompt=prompts[at],
                negative=negatives[at],
                seed=seed,
                steps=int(steps[at][0]) if steps is not None else None,
                size=(int(sizes[at][0]), int(sizes[at][1])) if sizes is not None else None,
            )
        )
    return rows


def _texts(request: Any, name: str) -> list[Any] | None:
    tensor = triton().get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    return [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        for value in tensor.as_numpy().reshape(-1)
    ]


def _numbers(request: Any, name: str, count: int) -> np.ndarray | None:
    tensor = triton().get_input_tensor_by_name(request, name)
    return None if tensor is None else np.array(tensor.as_numpy()).reshape(count, -1)


def _sentence(error: Exception) -> str:
    if isinstance(error, FewstepError):
        return str(error)
    logger.error("a picture could not be drawn", exc_info=error)
    return f"the picture could not be drawn ({type(error).__name__}: {error})"


def _answer(rows: list[Asked], outcomes: list[Outcome]) -> Any:
    utils = triton()
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    pictures = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if not failures and len({picture.shape for picture in pictures}) > 1:
        failures = ["pictures of one request must have one size; send a request per size"]
    if failures:
        error = utils.TritonError(failures[0])
        return utils.InferenceResponse(output_tensors=[], error=error)
    seeds = np.array([[row.seed] for row in rows], np.int64)
    outputs = [utils.Tensor("image", np.stack(pictures)), utils.Tensor("seed", seeds)]
    return utils.InferenceResponse(output_tensors=outputs)
