"""One layer at a time: errors that add up, and the skip list they propose."""

import math

import pytest

from fewstep.export.quantizing import ranking
from fewstep.export.quantizing.layers import layers_of, load_graph, without
from fewstep.export.quantizing.schemes import Int4
from fewstep.export.quantizing.sensitivities import Sensitivities, Sensitivity
from fewstep.export.quantizing.sensitivity import measure_sensitivity, spread
from fewstep.export.quantizing.skipping import ALWAYS, Skips
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
    found = measure_sensitivity(model, graph, scheme, chosen, feeds()[:4], skips=Skips(worst=1))
    errors = [one.error for one in found.found]
    assert errors == sorted(errors, reverse=True)
    assert {name for one in found.found for name in one.layers} == {layer.name for layer in chosen}
    assert all(0 < one.error <= one.worst for one in found.found)
    independent = math.sqrt(sum(error**2 for error in errors))
    assert 0.4 < found.whole / independent < 2.5  # squares add up, nearly


def test_groups_that_are_divided_find_the_layers_that_one_by_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme, model = Int4(), load_graph(source().root / "transformer/model.onnx")
    scheme.prepare(model)
    every = without(layers_of(model), ALWAYS)
    graph, told = source().manifest.graphs["transformer"], []

    def measured() -> Sensitivities:
        return measure_sensitivity(
            model, graph, scheme, every, feeds()[:2], skips=Skips(worst=2), progress=told.append
        )

    alone = measured()
    monkeypatch.setattr(ranking, "GROUPS", 8)
    divided = measured()
    assert all(one.is_layer for one in alone.found)
    assert not all(one.is_layer for one in divided.found)
    assert divided.is_settled
    assert divided.worst(2) == alone.worst(2)
    assert divided.whole == pytest.approx(alone.whole, rel=1e-6)
    assert len(told) < 2 * (len(every) + 1)  # fewer than one by one


def test_a_budget_skips_no_more_than_it_must() -> None:
    found = made(0.4, 0.3, 0.1, whole=math.sqrt(0.26))
    assert found.within(1.0) == ()
    assert found.within(0.33) == ("l0",)
    assert found.within(0.2) == ("l0", "l1")
    assert found.within(0.01) == ("l0", "l1", "l2")
    assert found.worst(2) == ("l0", "l1")


def test_what_the_sum_misses_is_spread() -> None:
    assert made(0.4, 0.3, whole=0.25).within(0.16) == ("l0",)  # half of what the squares say


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
