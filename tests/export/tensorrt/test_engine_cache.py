"""Damaged engines are refused and built anew; files are written whole, whoever else writes them."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.manifest import read_manifest
from fewstep.runtime.tensorrt.cache import FOLDER, EngineCache, write_whole
from fewstep.runtime.tensorrt.session import TensorRtSession
from tests.export.tensorrt.conftest import Played
from tests.export.tensorrt.fake_engine import model_path
from tests.export.tensorrt.small_engine import build, expected, feeds, opened

Damage = Callable[[Path, Path], object]
DAMAGES: dict[str, Damage] = {
    "plan cut": lambda plan, sidecar: plan.write_bytes(plan.read_bytes()[:-3]),
    "plan changed": lambda plan, sidecar: plan.write_bytes(plan.read_bytes()[:-1] + b"!"),
    "plan deleted": lambda plan, sidecar: plan.unlink(),
    "sidecar cut": lambda plan, sidecar: sidecar.write_text(sidecar.read_text()[:50]),
    "sidecar empty": lambda plan, sidecar: sidecar.write_text(""),
    "sidecar of another format": lambda plan, sidecar: sidecar.write_text('{"format": "other/9"}'),
}


def files_of(folder: Path) -> tuple[Path, Path]:
    """The plan and the sidecar of the one engine."""
    (plan,) = (folder / FOLDER).glob("*/engine.plan")
    return plan, plan.with_name("engine.json")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_engine_is_built_again(played: Played, folder: Path, damage: Damage) -> None:
    build(folder)
    damage(*files_of(folder))
    with pytest.raises((ExportFolderError, RuntimeSettingError), match="build (it again|one)"):
        opened(folder)
    engine = build(folder)
    assert played.recorder.names().count("Builder.build_serialized_network") == 2
    plan, sidecar = files_of(folder)
    assert plan.stat().st_size == engine.plan_bytes
    assert json.loads(sidecar.read_text())["plan_sha256"] == engine.plan_sha256
    found = opened(folder).run(feeds())["out_hidden_states"]
    np.testing.assert_array_equal(found, expected(folder, feeds()))
    assert build(folder) == engine
    assert played.recorder.names().count("Builder.build_serialized_network") == 2


def test_a_damaged_engine_does_not_block_the_others(
    played: Played, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(folder)
    _, broken = files_of(folder)
    other = build(folder, optimization_level=2)
    broken.write_text(broken.read_text()[:50])
    assert EngineCache(folder / FOLDER).engines("transformer") == [other]
    found = opened(folder).run(feeds())["out_hidden_states"]
    np.testing.assert_array_equal(found, expected(folder, feeds()))
    assert f"{broken} cannot be read" in caplog.text


def test_a_damaged_plan_is_refused(played: Played, folder: Path) -> None:
    build(folder)
    plan, _ = files_of(folder)
    plan.write_bytes(plan.read_bytes()[:-3])
    with pytest.raises(ExportFolderError, match="not the ones its engine.json recorded"):
        opened(folder)
    with pytest.raises(RuntimeSettingError, match="TensorRT refused the plan"):
        TensorRtSession(b"garbage", read_manifest(folder).graphs["transformer"])


def test_an_engine_of_other_weights_is_not_used(played: Played, folder: Path) -> None:
    file = model_path(folder)
    data = file.with_name("model.onnx_data")
    onnx.save(
        onnx.load(file), file, save_as_external_data=True, location=data.name, size_threshold=0
    )
    build(folder)
    before = opened(folder).run(feeds())["out_hidden_states"]
    data.write_bytes(np.frombuffer(data.read_bytes(), np.uint8)[::-1].tobytes())  # as an adapter
    with pytest.raises(RuntimeSettingError, match=r"another model.onnx or other weights"):
        opened(folder)
    build(folder)
    after = opened(folder).run(feeds())["out_hidden_states"]
    assert not np.array_equal(after, before)


def test_one_file_may_be_written_by_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, contents = tmp_path / "timing" / "shared.cache", [bytes([n]) * 5000 for n in range(4)]
    everybody = threading.Barrier(len(contents))
    flush, failures = os.fsync, []

    def together(descriptor: int) -> None:
        flush(descriptor)
        everybody.wait(timeout=20)  # all have written before the first renames

    def write(data: bytes) -> None:
        try:
            write_whole(file, data)
        except OSError as error:
            failures.append(error)

    monkeypatch.setattr(os, "fsync", together)
    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert file.read_bytes() in contents
    assert list(file.parent.iterdir()) == [file]
