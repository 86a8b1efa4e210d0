"""One layer at a time: errors that add up, and the skip list they propose."""

import math

import pytest

from fewstep.export.quantizing.layers import Layer, layers_of, load_graph, without
from fewstep.export.quantizing.schemes import Int4
from fewstep.export.quantizing.sensitivity import (
    Sensitivities,
    Sensitivity,
    grouped,
    measure_sensitivity,
    spread,
)
from fewstep.export.quantizing.skipping import ALWAYS
from tests.export.quantizing.folders import feeds, source


def made(*errors: float, whole: float) -> Sensitivities:
    found = [Sensitivity(f"l{i}", (f"l{i}",), 8, e, e) for i, e in enumerate(errors)]
    return Sensitivities(tuple(found), whole)


def test_layers_that_cost_more_are_found_and_left_out_first() -> None:
    scheme, model = Int4(), load_graph(source().root / "transformer/model.onnx")
    scheme.prepare(model)
    every = without(layers_of(model), ALWAYS)
    chosen = [layer for layer in every if ".attn.to_" in layer.name or "ff.net" in layer.name][:5]
    graph = source().manifest.graphs["transformer"]
    found = measure_sensitivity(model, graph, scheme, chosen, feeds()[:4])
    errors = [one.error for one in found.found]
    assert errors == sorted(errors, reverse=True)
    assert {name for one in found.found for name in one.layers} == {layer.name for layer in chosen}
    assert all(0 < one.error <= one.worst for one in found.found)
    independent = math.sqrt(sum(error**2 for error in errors))
    assert 0.4 < found.whole / independent < 2.5  # squares add up, nearly


def test_a_budget_skips_no_more_than_it_must() -> None:
    found = made(0.4, 0.3, 0.1, whole=math.sqrt(0.26))
    assert found.within(1.0) == ()
    assert found.within(0.33) == ("l0",)
    assert found.within(0.2) == ("l0", "l1")
    assert found.within(0.01) == ("l0", "l1", "l2")
    assert found.worst(2) == ("l0", "l1")


def test_what_the_sum_misses_is_spread() -> None:
    assert made(0.4, 0.3, whole=0.25).within(0.16) == ("l0",)  # half of what the squares say


def test_many_layers_are_measured_in_groups() -> None:
    layers = [Layer(f"m.b.{i}.{p}.weight", "", (), "MatMul", 1) for i in range(30) for p in "qkv"]
    assert len(grouped(layers, 100)) == 90
    assert set(grouped(layers, 48)) == {f"m.b.{i}" for i in range(30)}
    assert set(grouped(layers, 5)) == {"m.b"}


def test_calls_are_taken_from_the_whole_trajectory() -> None:
    given = [{"x": i} for i in range(40)]
    taken = [one["x"] for one in spread(given, 5)]  # pyright: ignore[reportArgumentType]
    assert taken == [0, 10, 20, 29, 39]
    assert len(spread(given[:3], 5)) == 3  # pyright: ignore[reportArgumentType]


def test_the_table_marks_what_stays_float() -> None:
    table = made(0.4, 0.3, whole=0.5).table(("l0",))
    marks = list(table.columns[4].cells)
    assert marks == ["yes", ""]
    assert made(0.4, whole=0.5).as_json()["layers"][0]["error"] == pytest.approx(0.4)
