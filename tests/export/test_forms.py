"""Folders in half precision, and of the opset that has attention as one operator."""

import numpy as np
import onnx
import pytest

from fewstep.export.checking.limits import FLOAT16
from fewstep.export.checking.parity import stills
from fewstep.metrics.parity import worst_parity
from fewstep.runtime.manifest import read_manifest
from tests.export.tiny_exports import (
    BY_NAME,
    EVERY,
    PROMPTS,
    Drawn,
    assert_same,
    by_pipeline,
    by_runtime,
    exported,
    runtime_of,
)


def drawn(name: str, *form: object) -> Drawn:
    """Two prompts, four steps."""
    export = BY_NAME[name]
    runtime = runtime_of(name, export.recipe(), *form)
    return by_runtime(runtime, list(PROMPTS[:2]), export.size(4, 6))


@EVERY
def test_half_precision_draws_the_pipelines_pictures(name: str) -> None:
    export = BY_NAME[name]
    found = drawn(name, "fp16")
    wanted = by_pipeline(export, export.recipe(), list(PROMPTS[:2]), export.size(4, 6))
    pictures = stills(wanted.pixels), stills(found.pixels)
    assert worst_parity(*pictures).psnr_db >= FLOAT16.psnr_db
    scale = max(float(np.abs(wanted.latents).max()), 1.0)
    np.testing.assert_allclose(found.latents, wanted.latents, rtol=0, atol=2e-2 * scale)


@EVERY
def test_half_precision_stores_weights_in_half(name: str) -> None:
    folder = exported(name, "fp16")
    manifest = read_manifest(folder)
    assert manifest.precision == "fp16"
    for graph in manifest.graphs.values():
        model = onnx.load(folder / graph.file, load_external_data=False)
        wide = sum(
            np.prod(tensor.dims)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and graph.precision == "fp16"
        )
        assert wide <= 0.1 * sum(np.prod(t.dims) for t in model.graph.initializer), graph.file


@EVERY
def test_opset_23_draws_what_18_draws(name: str) -> None:
    assert_same(drawn(name, "fp32", 23), drawn(name))


@pytest.mark.slow
def test_opset_23_has_attention_as_one_operator() -> None:
    folder = exported("sd3", "fp32", 23)
    for graph in read_manifest(folder).graphs.values():
        assert graph.opset == 23
    model = onnx.load(folder / "transformer/model.onnx", load_external_data=False)
    assert {entry.version for entry in model.opset_import} == {23}
    assert "Attention" in {node.op_type for node in model.graph.node}
