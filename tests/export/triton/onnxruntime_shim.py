"""Stands in for Triton's ONNX Runtime backend, which the test server's wheel does not have.

A model of the Python backend that runs the model.onnx beside it. Names, types and shapes are those
of the generated config.pbtxt, of which only the line `backend` is changed.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """One component."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        home = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            home / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feeds = {}
        for name in self.inputs:
            feeds[name] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        wanted = list(request.requested_output_names()) or self.outputs
        values = self.session.run(wanted, feeds)
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(value))
            for name, value in zip(wanted, values, strict=True)
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)
