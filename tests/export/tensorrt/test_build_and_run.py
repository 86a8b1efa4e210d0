"""The builder and the session, driven against the names of three releases of TensorRT.

Nothing here shows that TensorRT builds or runs anything: it shows that it is called rightly.
"""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console
from rich.progress import Progress

from fewstep.errors import ExportError, RuntimeSettingError
from fewstep.export.tensorrt.build import build_engine
from fewstep.export.tensorrt.command import TensorRtOptions, make_plans, run
from fewstep.export.tensorrt.monitor import BuildProgress, make_monitor
from fewstep.runtime.manifest import read_manifest
from fewstep.runtime.session import Loader, Session
from fewstep.runtime.tensorrt.buffers import DeviceArray
from fewstep.runtime.tensorrt.opening import TensorRtLoader
from tests.export.tensorrt.conftest import Played
from tests.export.tensorrt.fake_engine import model_path
from tests.export.tensorrt.small_engine import build, expected, feeds, opened, plan_of, write_lora


def test_calls_come_in_the_right_order(played: Played, folder: Path) -> None:
    build(folder)
    names = played.recorder.names()
    order = [
        "Builder.create_network",
        "OnnxParser.set_flag",
        "OnnxParser.parse_from_file",
        "Builder.create_builder_config",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.set_timing_cache",
        "IBuilderConfig.progress_monitor =",
        "Builder.build_serialized_network",
        "IBuilderConfig.get_timing_cache",
        "ITimingCache.serialize",
    ]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    (flags,) = played.recorder.arguments("Builder.create_network")[0]
    assert flags == 1 << played.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED


def test_the_engine_is_written_with_its_sidecar_and_timings(played: Played, folder: Path) -> None:
    engine = build(folder)
    (home,) = (folder / "tensorrt").glob("transformer-sm90-*")
    assert sorted(file.name for file in home.iterdir()) == ["engine.json", "engine.plan"]
    assert (home / "engine.plan").stat().st_size == engine.plan_bytes
    assert json.loads((home / "engine.json").read_text())["identity"]["tensorrt"] == played.version
    timings = folder / "tensorrt/timing" / f"tensorrt-{played.version}-sm90.cache"
    assert timings.read_bytes() == b"timings"


def test_float32_stays_float32_unless_asked(played: Played, folder: Path) -> None:
    build(folder)
    plan = next((folder / "tensorrt").glob("*/engine.plan"))
    assert json.loads(plan.read_text())["flags"] == []  # TensorRT starts with TF32 on


def test_an_engine_is_built_once(played: Played, folder: Path) -> None:
    first = build(folder)
    assert build(folder) == first
    assert played.recorder.names().count("Builder.build_serialized_network") == 1
    build(folder, optimization_level=2)
    assert played.recorder.names().count("Builder.build_serialized_network") == 2


def test_two_builds_at_once_make_one_engine(played: Played, folder: Path) -> None:
    plan = plan_of(folder, build=True)
    threads = [
        threading.Thread(target=build_engine, args=(plan, Progress(disable=True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert played.recorder.names().count("Builder.build_serialized_network") == 1


def test_timings_of_another_machine_are_dropped(played: Played, folder: Path) -> None:
    plan = plan_of(folder, build=True)
    file = plan.cache.timing_file(played.version, "sm90")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another GPU")
    build_engine(plan, Progress(disable=True))
    assert file.read_bytes() == b"timings"


def test_ctrl_c_stops_a_build_and_leaves_nothing(
    played: Played, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, build=True)
    real = played.trt.Builder.build_serialized_network

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(played.trt.Builder, "build_serialized_network", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(plan, Progress(disable=True))
    assert signal.getsignal(signal.SIGINT) is before
    assert not plan.folder.exists()
    assert not list(folder.rglob("*.part"))


def test_phases_are_shown_inside_one_another(played: Played) -> None:
    bars = Progress(disable=True)
    monitor = make_monitor(BuildProgress(bars, lambda: False))
    monitor.phase_start("Building Engine", None, 2)
    monitor.phase_start("Tactics", "Building Engine", 3)
    assert monitor.step_complete("Tactics", 1) is True
    assert [(task.description, task.completed) for task in bars.tasks] == [
        ("Building Engine", 0),
        ("  Tactics", 2),
    ]
    monitor.phase_finish("Tactics")
    monitor.phase_finish("Building Engine")
    assert bars.tasks == []


def test_a_session_gives_what_the_graph_gives(played: Played, folder: Path) -> None:
    build(folder)
    opened_session = opened(folder)
    for batch, height in ((1, 8), (3, 8), (1, 12), (4, 10)):
        for seed in range(4):  # first run, recording, launches of both buffer sets
            inputs = feeds(batch, height, seed)
            found = opened_session.run(inputs)["out_hidden_states"]
            np.testing.assert_array_equal(found, expected(folder, inputs))
    assert played.gpu.captures == 8  # one per shape and buffer set
    assert played.gpu.launches == 8


def test_it_is_a_session_like_the_others(played: Played, folder: Path) -> None:
    build(folder)
    manifest = read_manifest(folder)
    loader: Loader = TensorRtLoader(folder, manifest)
    found: Session = loader.load(manifest.graphs["transformer"])
    assert (loader.name, found.provider) == ("tensorrt-native", "tensorrt-native")
    assert found.graph == manifest.graphs["transformer"]
    assert found.run(feeds(), []) == {}
    assert list(found.run(feeds(), ["out_hidden_states"])) == ["out_hidden_states"]


def test_outputs_can_be_fed_back_without_leaving_the_gpu(played: Played, folder: Path) -> None:
    build(folder)
    opened_session = opened(folder)
    inputs = feeds()
    step: dict[str, np.ndarray | DeviceArray] = dict(inputs)
    value = inputs["hidden_states"]
    for _ in range(7):
        output = opened_session.run_on_device(step)["out_hidden_states"]
        step = {"hidden_states": output, "timestep": inputs["timestep"]}
        value = expected(folder, {"hidden_states": value, "timestep": inputs["timestep"]})
    last = opened_session.run(step)["out_hidden_states"]
    value = expected(folder, {"hidden_states": value, "timestep": inputs["timestep"]})
    np.testing.assert_array_equal(last, value)
    assert played.gpu.launches > 0


def test_shapes_are_set_before_the_engine_runs(played: Played, folder: Path) -> None:
    build(folder)
    opened(folder).run(feeds())
    names = played.recorder.names()
    runs = names.index("IExecutionContext.execute_async_v3")
    assert names.index("IExecutionContext.set_input_shape") < runs
    assert names.index("IExecutionContext.set_tensor_address") < runs


def test_new_weights_are_used_by_recorded_shapes(played: Played, folder: Path) -> None:
    adapter = write_lora(folder)
    build(folder, refit=adapter)
    opened_session = opened(folder)
    for seed in range(4):
        opened_session.run(feeds(seed=seed))
    weight = np.eye(4, dtype=np.float32)
    opened_session.refit({"mix.weight": weight * 2})
    found = opened_session.run(feeds())["out_hidden_states"]
    model = onnx.load(model_path(folder))
    bias = onnx.numpy_helper.to_array(model.graph.initializer[1])
    wanted = feeds()["hidden_states"] * 2 + bias[:, None, None] + 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert "Refitter.get_missing_weights" in played.recorder.names()


def test_refit_says_what_is_wrong(played: Played, folder: Path) -> None:
    build(folder, refit=write_lora(folder))
    opened_session = opened(folder)
    with pytest.raises(RuntimeSettingError, match="no refittable weight mix.bias"):
        opened_session.refit({"mix.bias": np.zeros(4, np.float32)})
    with pytest.raises(RuntimeSettingError, match="has 9 values"):
        opened_session.refit({"mix.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(RuntimeSettingError, match="in 128 bytes"):
        opened_session.refit({"mix.weight": np.zeros((4, 4), np.float64)})


def test_a_session_says_what_is_wrong(played: Played, folder: Path) -> None:
    build(folder)
    opened_session = opened(folder)
    with pytest.raises(RuntimeSettingError, match=r"shape \(5, 4, 8, 8\).*\(4, 4, 12, 8\)"):
        opened_session.run(feeds(batch=5))
    with pytest.raises(RuntimeSettingError, match="timestep is missing"):
        opened_session.run({"hidden_states": feeds()["hidden_states"]})
    with pytest.raises(RuntimeSettingError, match="float32, got float64"):
        opened_session.run(feeds() | {"timestep": np.array([0.5])})
    with pytest.raises(RuntimeSettingError, match="extra is no input"):
        opened_session.run(feeds() | {"extra": np.zeros(1)})


def test_everything_is_given_back(played: Played, folder: Path) -> None:
    build(folder)
    opened_session = opened(folder)
    for _ in range(3):
        opened_session.run(feeds())
    assert played.gpu.blocks
    opened_session.close()
    assert not played.gpu.blocks


def test_an_engine_of_another_release_is_named(played: Played, folder: Path) -> None:
    build(folder)
    file = next((folder / "tensorrt").glob("*/engine.json"))
    file.write_text(file.read_text().replace(played.version, "10.13.2.6"))
    with pytest.raises(RuntimeSettingError) as caught:
        opened(folder)
    assert f"built with TensorRT 10.13.2.6 and TensorRT {played.version} is" in str(caught.value)


def test_an_engine_of_an_older_graph_is_not_used(played: Played, folder: Path) -> None:
    build(folder)
    model = onnx.load(model_path(folder))
    model.producer_name = "changed"
    onnx.save(model, model_path(folder))
    with pytest.raises(RuntimeSettingError, match="from another model.onnx"):
        opened(folder)


def test_the_gpu_must_be_the_target(played: Played, folder: Path) -> None:
    with pytest.raises(ExportError, match="target is sm80 and this machine's GPU is sm90"):
        make_plans(TensorRtOptions(folder=folder, target="sm80", build=True))


def test_the_command_builds_and_says_that_it_is_not_verified(
    played: Played, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TensorRtOptions(folder=folder, target="sm90", build=True), Console(width=200))
    text = capsys.readouterr().out
    assert "engine build not verified on this release" in text
    assert list((folder / "tensorrt").glob("transformer-sm90-*/engine.plan"))
