"""The pipeline model, called as Triton calls it: one bad request of a batch fails by itself.

Here a few lines play the module that exists inside Triton only, and run the repository's component
graphs with ONNX Runtime; test_server.py asks a real server.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fewstep.export.triton.pipeline_model import TritonPythonModel
from fewstep.export.triton.repository import write_repository
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.digits_exports import PROMPTS, exported

SIDE = 64


class Tensor:
    """A named array."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        """The values."""
        return self.value


class Response:
    """Tensors or an error; of a component and of the pipeline."""

    def __init__(self, output_tensors: list[Tensor], error: str | None = None) -> None:
        self.tensors, self.reason = {tensor.name: tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        """Whether it failed."""
        return self.reason is not None


def triton_module(repository: Path) -> ModuleType:
    """What the pipeline model imports."""
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    class Request:
        """To a component."""

        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: list[Tensor]
        ) -> None:
            if model_name not in sessions:
                file = repository / model_name / "1" / "model.onnx"
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                sessions[model_name] = onnxruntime.InferenceSession(
                    file, options, providers=["CPUExecutionProvider"]
                )
            self.session, self.names = sessions[model_name], requested_output_names
            self.feeds = {tensor.name: tensor.value for tensor in inputs}

        def exec(self) -> Response:
            """Run it."""
            found = self.session.run(self.names, self.feeds)
            made = zip(self.names, found, strict=True)
            return Response([Tensor(name, np.asarray(value)) for name, value in made])

    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, Request, Response
    module.TritonError = str
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.get_output_tensor_by_name = lambda response, name: response.tensors[name]
    return module


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    """The pipeline of a generated repository, as Triton initialises it."""
    repository = tmp_path / "repository"
    write_repository(exported("sd3").folder, repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module(repository))
    parameters = {"form": "components", "components": "fewstep_"}
    stated = {name: {"string_value": value} for name, value in parameters.items()}
    found = TritonPythonModel()
    found.initialize(
        {
            "model_config": json.dumps({"parameters": stated}),
            "model_repository": str(repository / "fewstep_pipeline"),
            "model_version": "1",
        }
    )
    return found


def request(
    prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """One request, a row per prompt."""
    texts = np.array([[prompt.encode()] for prompt in prompts], object)
    found = {"prompt": Tensor("prompt", texts)}
    found["seed"] = Tensor("seed", np.array([[seed] for seed in seeds], np.int64))
    if size is not None:
        found["size"] = Tensor("size", np.array([size] * len(prompts), np.int32))
    return found


def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """What the runtime draws."""
    runtime = FewStepRuntime.load(
        exported("sd3").folder, provider="cpu", threads=1, has_cache=False
    )
    return runtime(list(prompts), seed=list(seeds)).pixels


def test_good_requests_go_together(model: TritonPythonModel) -> None:
    first, second = model.execute([request(PROMPTS[:1], [7]), request(PROMPTS[1:], [8, 9])])
    wanted = pictures(PROMPTS, [7, 8, 9])
    found = [first.tensors["image"].value, second.tensors["image"].value]
    np.testing.assert_array_equal(np.concatenate(found), wanted)
    np.testing.assert_array_equal(second.tensors["seed"].value, [[8], [9]])


def test_a_bad_request_fails_by_itself(model: TritonPythonModel) -> None:
    batch = [
        request(PROMPTS[:1], [7]),
        request(PROMPTS[:1], [-1]),
        request(PROMPTS[1:], [8, 9]),
        request(PROMPTS[:2], [3, -2]),  # one row of two
        request(PROMPTS[:1], [7], (SIDE - 1, SIDE)),
        request(PROMPTS[:1], [7], (0, -8)),
    ]
    answers = model.execute(batch)
    reasons = [answer.reason for answer in answers]
    assert [reason is None for reason in reasons] == [True, False, True, False, False, False]
    assert "seed must be a whole number" in reasons[1]
    assert "got -2" in reasons[3]
    np.testing.assert_array_equal(answers[0].tensors["image"].value, pictures(PROMPTS[:1], [7]))
    np.testing.assert_array_equal(answers[2].tensors["image"].value, pictures(PROMPTS[1:], [8, 9]))


def test_a_failure_of_any_kind_stays_with_its_request(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw = TritonPythonModel._draw

    def exhausted(self: TritonPythonModel, rows: list[Any]) -> np.ndarray:
        if any(row.seed == 5 for row in rows):
            raise MemoryError("no room for 8 GiB")
        return draw(self, rows)

    monkeypatch.setattr(TritonPythonModel, "_draw", exhausted)
    bad, good = model.execute([request(PROMPTS[:1], [5]), request(PROMPTS[:1], [7])])
    assert bad.reason == "the picture could not be drawn (MemoryError: no room for 8 GiB)"
    assert "Traceback" in caplog.text  # the server's log has the rest
    np.testing.assert_array_equal(good.tensors["image"].value, pictures(PROMPTS[:1], [7]))
