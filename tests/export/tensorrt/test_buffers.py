"""GPU memory of a session stays bounded, whatever shapes come."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.tensorrt import cuda
from fewstep.runtime.tensorrt.buffers import KEPT_GRAPHS, KEPT_SHAPES
from tests.export.tensorrt.conftest import Played
from tests.export.tensorrt.small_engine import build, expected, feeds, opened

SHAPES = [(batch, height) for height in (8, 10, 12) for batch in (1, 2, 3, 4)]
BLOCKS = 4  # two inputs, and an output in two sets


def test_only_the_shapes_used_last_are_kept(played: Played, folder: Path) -> None:
    build(folder)
    session = opened(folder)
    for batch, height in SHAPES * 2:
        for seed in range(3):
            inputs = feeds(batch, height, seed)
            found = session.run(inputs)["out_hidden_states"]
            np.testing.assert_array_equal(found, expected(folder, inputs))
        assert len(played.gpu.blocks) <= BLOCKS * KEPT_SHAPES
    assert len(SHAPES) > KEPT_SHAPES
    assert len(played.gpu.blocks) == BLOCKS * KEPT_SHAPES
    assert session.num_graphs == 2 * KEPT_SHAPES == len(played.gpu.graphs)
    session.close()
    assert not played.gpu.blocks
    assert not played.gpu.graphs


def test_a_shape_in_use_is_not_recorded_again(played: Played, folder: Path) -> None:
    build(folder)
    session = opened(folder)
    for batch, height in SHAPES:  # more than are kept, with one used all the time
        session.run(feeds())
        session.run(feeds(batch, height))
    captures = played.gpu.captures
    for _ in range(3):
        session.run(feeds())
    assert played.gpu.captures == captures


def test_an_output_whose_memory_was_given_back_is_refused(played: Played, folder: Path) -> None:
    build(folder)
    session = opened(folder)
    kept = session.run_on_device(feeds())["out_hidden_states"]
    for batch, height in SHAPES[1 : KEPT_SHAPES + 1]:
        session.run(feeds(batch, height))
    with pytest.raises(RuntimeSettingError, match="no longer on the GPU: its session was closed"):
        session.run({"hidden_states": kept, "timestep": feeds()["timestep"]})
    found = session.run(feeds())["out_hidden_states"]  # and the session goes on
    np.testing.assert_array_equal(found, expected(folder, feeds()))


def test_inputs_at_new_addresses_do_not_pile_up_graphs(played: Played, folder: Path) -> None:
    build(folder)
    session, shown = opened(folder), feeds()
    for _ in range(KEPT_GRAPHS):  # each from a session of its own, so at an address of its own
        source = opened(folder)
        output = source.run_on_device(shown)["out_hidden_states"]
        for _ in range(2):
            session.run({"hidden_states": output, "timestep": shown["timestep"]})
    assert session.num_graphs == KEPT_GRAPHS


def test_a_full_gpu_leaves_nothing_half_prepared(
    played: Played, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder)
    session = opened(folder)
    real, allowed = played.gpu.allocate, iter(range(3))

    def refused(size: int) -> tuple[object, ...]:
        if next(allowed, None) is None:
            return cuda.runtime().cudaError_t.cudaErrorMemoryAllocation, None
        return cuda.runtime().cudaError_t.cudaSuccess, real(size)

    with monkeypatch.context() as patch:
        patch.setattr(cuda.runtime(), "cudaMalloc", refused)
        with pytest.raises(RuntimeSettingError, match="could not allocate"):
            session.run(feeds())
    assert not played.gpu.blocks
    found = session.run(feeds())["out_hidden_states"]
    np.testing.assert_array_equal(found, expected(folder, feeds()))
