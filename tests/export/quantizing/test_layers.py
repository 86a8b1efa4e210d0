"""Layers are found by their parameter's name, and rewriting a graph does not change its answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fewstep.errors import ExportError
from fewstep.export.quantizing.layers import (
    layers_of,
    load_graph,
    replace_weights,
    split_linear,
    without,
)
from fewstep.export.quantizing.schemes import Int8Static
from fewstep.export.quantizing.skipping import ALWAYS, parse_skips
from fewstep.runtime.onnx_session import OnnxLoader
from tests.export.quantizing.folders import feeds, source

GRAPH = "transformer"


def transformer() -> ir.Model:
    return load_graph(source().root / source().manifest.graphs[GRAPH].file)


def answers(model: ir.Model, folder: Path) -> list[np.ndarray]:
    ir.save(model, folder / "m.onnx", external_data="m.onnx_data")
    graph = replace(source().manifest.graphs[GRAPH], file="m.onnx")
    session = OnnxLoader(folder, {}, threads=1, has_cache=False).load(graph)
    return [session.run(given)["out_hidden_states"] for given in feeds()]


def test_splitting_linear_layers_changes_no_answer(tmp_path: Path) -> None:
    whole, split = transformer(), transformer()
    split_linear(split)
    assert {node.op_type for node in whole.graph} >= {"Gemm", "MatMul"}
    assert "Gemm" not in {node.op_type for node in split.graph}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pairs = zip(answers(whole, tmp_path / "a"), answers(split, tmp_path / "b"), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) < 1e-5


def test_every_linear_layer_of_the_network_is_found() -> None:
    split = transformer()
    split_linear(split)
    names = {layer.name for layer in layers_of(split)}
    assert "model.transformer_blocks.0.attn.to_q.weight" in names
    assert "model.time_text_embed.timestep_embedder.linear_1.weight" in names  # was a Gemm
    assert len(names) == 32
    everything = layers_of(transformer(), Int8Static.kinds)
    assert {layer.name for layer in everything} == names | {"model.pos_embed.proj.weight"}


def test_first_and_last_layers_are_skipped_unless_nothing_is() -> None:
    layers = layers_of(transformer(), Int8Static.kinds)
    kept = {layer.name for layer in without(layers, ALWAYS)}
    assert {layer.name for layer in layers} - kept == {
        "model.proj_out.weight",
        "model.pos_embed.proj.weight",
    }
    assert without(layers, parse_skips(["none"]).patterns) == layers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["["], "no regular expression"),
        (["."], "leaves none of"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        without(layers_of(transformer(), Int8Static.kinds), parse_skips(words).patterns)


@pytest.mark.parametrize("word", ["auto:", "auto:x", "budget:-1", "budget:1e", "budget:"])
def test_numbers_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(ExportError, match="--skip got"):
        parse_skips([word])


def test_skips_are_read() -> None:
    found = parse_skips(["attn", "auto:3", "budget:0.05"])
    assert found.patterns == (*ALWAYS, "attn")
    assert (found.worst, found.budget, found.needs_sensitivity) == (3, 0.05, True)
    assert not parse_skips([]).needs_sensitivity


def test_weights_are_replaced_by_parameter_name_whichever_way_they_lie() -> None:
    model = transformer()
    split_linear(model)
    name = "model.transformer_blocks.0.attn.to_q.weight"
    new = np.arange(128 * 128, dtype=np.float32).reshape(128, 128)
    replace_weights(model, {name: new})
    held = model.graph.initializers[f"{name}::T"].const_value
    assert held is not None
    assert np.array_equal(held.numpy(), new.T)
    with pytest.raises(ExportError, match="no weight 'model.other'"):
        replace_weights(model, {"model.other": new})
    with pytest.raises(ExportError, match="another in the graph"):
        replace_weights(model, {name: new[:4]})
