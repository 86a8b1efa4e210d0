"""The most sensitive of many layers are found from groups, by few measurements."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fewstep.export.quantizing.layers import Layer
from fewstep.export.quantizing.ranking import GROUPS, MOST, PARTS, Cost, divided, grouped, rank
from fewstep.export.quantizing.sensitivities import Sensitivities, Sensitivity
from fewstep.export.quantizing.skipping import Skips

LAYERS = [
    Layer(f"m.{side}.{block}.attentions.{i}.{kind}.weight", f"{side}{block}{i}{kind}", (), "", 4)
    for side in ("down", "up")
    for block in range(4)
    for i in range(3)
    for kind in ("q", "k", "v", "out", "ff.0", "ff.1", "ff.2", "conv1", "conv2", "conv3", "in")
]
"""264 layers in 24 places."""


class Model:
    """Layers whose errors are independent: their squares add up."""

    def __init__(self, errors: dict[str, float]) -> None:
        self.errors = errors
        self.asked: list[int] = []

    def measure(self, layers: Sequence[Layer]) -> Cost:
        self.asked.append(len(layers))
        error = math.sqrt(sum(self.errors[layer.name] ** 2 for layer in layers))
        return Cost(error, 2 * error)

    def one_by_one(self) -> Sensitivities:
        """What there is to find."""
        order = sorted(self.errors.items(), key=lambda item: -item[1])
        each = tuple(Sensitivity(name, (name,), 4, error, error) for name, error in order)
        return Sensitivities(each, math.sqrt(sum(e**2 for e in self.errors.values())))


def uneven(seed: int) -> Model:
    """As networks are: a few layers cost far more than the rest."""
    errors = np.exp(np.random.default_rng(seed).normal(-5, 1.5, len(LAYERS)))
    return Model({layer.name: float(e) for layer, e in zip(LAYERS, errors, strict=True)})


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("seed", range(4))
def test_the_worst_are_those_that_one_by_one_finds(count: int, seed: int) -> None:
    model = uneven(seed)
    found = rank(LAYERS, Skips(worst=count), model.measure)
    assert found.is_settled
    assert found.worst(count) == model.one_by_one().worst(count)
    assert len(model.asked) <= MOST
    assert sorted(name for one in found.found for name in one.layers) == sorted(model.errors)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_skips_the_layers_that_one_by_one_skips(seed: int) -> None:
    model = uneven(seed)
    alone = model.one_by_one()
    budget = math.sqrt(sum(one.error**2 for one in alone.found[6:])) * 1.001
    found = rank(LAYERS, Skips(budget=budget), model.measure)
    assert found.is_settled
    assert found.chosen(Skips(budget=budget)) == alone.within(budget) == alone.worst(6)
    assert len(model.asked) <= MOST


def test_measuring_ends_where_layers_are_alike() -> None:
    model = Model({layer.name: 0.01 + 1e-6 * i for i, layer in enumerate(LAYERS)})
    told: list[str] = []
    found = rank(LAYERS, Skips(worst=5), model.measure, progress=told.append)
    assert not found.is_settled
    assert len(set(found.chosen(Skips(worst=5)))) == 5
    assert len(model.asked) == len(told) <= MOST
    assert told[-1].endswith(f"(measurement {len(told)} of {MOST} or fewer)")


def test_so_many_layers_are_found_as_were_asked_for() -> None:
    model = Model({layer.name: 0.01 for layer in LAYERS})
    found = rank(LAYERS, Skips(worst=200), model.measure)
    assert len(set(found.chosen(Skips(worst=200)))) == 200
    assert len(model.asked) < 2 * len(LAYERS)


def test_up_to_48_layers_are_measured_one_by_one() -> None:
    model = uneven(0)
    found = rank(LAYERS[:GROUPS], Skips(worst=1), model.measure)
    assert all(one.is_layer and one.name == one.layers[0] for one in found.found)
    assert sorted(model.asked) == [1] * GROUPS + [GROUPS]


def test_kernels_of_one_layer_are_measured_together() -> None:
    kernels = [Layer("m.up.conv.weight", f"m.up.conv.weight::{i}", (), "Conv", 1) for i in range(4)]
    layers = [*kernels, Layer("m.out.weight", "m.out.weight", (), "Conv", 1)]
    model = Model({"m.up.conv.weight": 0.5, "m.out.weight": 0.1})
    found = rank(layers, Skips(worst=1), model.measure)
    assert model.asked == [5, 4, 1]
    assert found.worst(1) == ("m.up.conv.weight",)
    assert found.found[0].size == 4


def test_places_have_ever_shorter_names_until_few_enough() -> None:
    layers = [Layer(f"m.b.{i}.{p}.weight", "", (), "MatMul", 1) for i in range(30) for p in "qkv"]
    assert len(grouped(layers, 100)) == 90
    assert set(grouped(layers, 48)) == {f"m.b.{i}" for i in range(30)}
    assert set(grouped(layers, 5)) == {"m.b"}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 29, 266])
def test_a_group_is_divided_into_neighbours(count: int) -> None:
    names = [f"l{i}" for i in range(count)]
    parts = divided(names)
    assert [name for part in parts for name in part] == names
    assert len(parts) == min(count, PARTS)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= max(sizes) - 1 >= 0
