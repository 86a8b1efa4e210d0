"""Graphs small enough to read, and an export folder around one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fewstep.recipe import SIDECAR_NAME
from fewstep.runtime.manifest import FORMAT, MAJOR, Graph, Manifest, Tensor
from tests.tiny.recipes import flow_recipe

CHANNELS = 4
Ports = Mapping[str, tuple[int, Sequence[int | str]]]
"""Name -> element type and dims."""


def make_model(
    nodes: list[NodeProto],
    *,
    weights: dict[str, np.ndarray] | None = None,
    inputs: Ports | None = None,
    outputs: Ports | None = None,
    opset: int = 18,
    domains: tuple[str, ...] = (),
) -> ModelProto:
    """A model with one float input x and one float output y, unless said otherwise."""
    free: Ports = {"x": (TensorProto.FLOAT, ["batch_size", 4])}
    ends: Ports = {"y": (TensorProto.FLOAT, ["batch_size", 4])}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in (inputs or free).items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in (outputs or ends).items()],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    sets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def transformer() -> ModelProto:
    """A denoiser in miniature: a channel mix, a shift, and the timestep added to everything."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("Transpose", ["hidden_states"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "mix.weight::T"], ["mixed"]),
        helper.make_node("Add", ["mixed", "mix.bias"], ["shifted"]),
        helper.make_node("Add", ["shifted", "timestep"], ["timed"]),
        helper.make_node("Transpose", ["timed"], ["out_hidden_states"], perm=[0, 3, 1, 2]),
    ]
    shape: list[int | str] = ["batch_size", CHANNELS, "height", "width"]
    return make_model(
        nodes,
        weights={
            "mix.weight::T": rng.normal(size=(CHANNELS, CHANNELS)).astype(np.float32),
            "mix.bias": rng.normal(size=CHANNELS).astype(np.float32),
        },
        inputs={
            "hidden_states": (TensorProto.FLOAT, shape),
            "timestep": (TensorProto.FLOAT, [1]),
        },
        outputs={"out_hidden_states": (TensorProto.FLOAT, shape)},
    )


def export_folder(folder: Path) -> Path:
    """A folder with one component, as `fewstep export onnx` lays it out."""
    home = folder / "transformer"
    home.mkdir(parents=True)
    onnx.save(transformer(), home / "model.onnx")
    (home / "config.json").write_text(json.dumps({"sample_size": 8}))
    dims = ("batch_size", str(CHANNELS), "height", "width")
    manifest = Manifest(
        format=f"{FORMAT}/{MAJOR}",
        family="sd3",
        pipeline="StableDiffusion3Pipeline",
        precision="fp32",
        settings={"vae_scale_factor": 8.0},
        graphs={
            "transformer": Graph(
                file="transformer/model.onnx",
                inputs=(
                    Tensor(name="hidden_states", dtype="float32", dims=dims),
                    Tensor(name="timestep", dtype="float32", dims=("1",)),
                ),
                outputs=(Tensor(name="out_hidden_states", dtype="float32", dims=dims),),
                opset=18,
                precision="fp32",
                multiples={"height": 2, "width": 2},
            )
        },
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    (folder / SIDECAR_NAME).write_text(flow_recipe("sd3").to_json())
    return folder
