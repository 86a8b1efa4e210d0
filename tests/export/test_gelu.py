"""GELU's products in another order: the same bits, and one operator in ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.export.gelu import halve_first
from tests.export.tiny_exports import exported

OPTIMISED = {"none": "Gelu", "tanh": "FastGelu"}


class Gated(nn.Module):
    """A gated feed-forward layer, as SD 1.5 and SDXL have it."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate, approximate=self.approximate)


def traced(module: nn.Module, x: Tensor) -> ir.Model:
    program = torch.onnx.export(
        module.eval(), (x,), opset_version=18, dynamo=True, verbose=False, optimize=True
    )
    assert program is not None
    return program.model


def session(model: bytes | str, level: Any, **options: Any) -> ort.InferenceSession:
    chosen = ort.SessionOptions()
    chosen.graph_optimization_level = level
    for name, value in options.items():
        setattr(chosen, name, value)
    return ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])


def answer(model: ir.Model, x: Tensor) -> Any:
    """What the graph says, computed as it is written."""
    data, plain = ir.to_proto(model).SerializeToString(), ort.GraphOptimizationLevel
    made = session(data, plain.ORT_DISABLE_ALL)
    return made.run(None, {made.get_inputs()[0].name: x.numpy()})[0]


def operators_after(model: bytes | str, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime computes with."""
    file = folder / "optimised.onnx"
    level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session(model, level, optimized_model_filepath=str(file), log_severity_level=3)
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("approximate", OPTIMISED)
def test_the_same_bits_and_one_operator(approximate: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = 3.0 * torch.randn(4, 7, 16)
    model = traced(Gated(approximate), x)
    before = operators_after(ir.to_proto(model).SerializeToString(), tmp_path)
    wanted = answer(model, x)
    halve_first(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = answer(model, x)
    assert np.array_equal(found, wanted)
    np.testing.assert_allclose(found, Gated(approximate)(x), rtol=1e-5, atol=1e-5)
    after = operators_after(ir.to_proto(model).SerializeToString(), tmp_path)
    assert not before[OPTIMISED[approximate]]
    assert after[OPTIMISED[approximate]] == 1
    assert not after["Erf"] + after["Tanh"]


class Other(nn.Module):
    """Halves and hyperbolic tangents that are no GELU."""

    def forward(self, x: Tensor) -> Tensor:
        shared = 0.5 * (1.0 + torch.tanh(x))
        return x * shared + shared + x * (0.25 * (1.0 + torch.tanh(x))) + torch.erf(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_no_gelu_is_left_alone() -> None:
    model = traced(Other(), torch.randn(2, 3))
    before = [node.op_type for node in model.graph]
    halve_first(model)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(("name", "component"), [("sd15", "unet"), ("sd3", "transformer")])
def test_exported_networks_have_no_gelu_left_in_pieces(
    name: str, component: str, tmp_path: Path
) -> None:
    after = operators_after(str(exported(name) / component / "model.onnx"), tmp_path)
    assert after["Gelu"] + after["FastGelu"] > 0
    assert not after["Erf"] + after["Tanh"]
