"""Engines of the digits export draw what the processor draws; so does ONNX Runtime on CUDA.

    python -m pytest -m gpu tests/export/tensorrt

runs this with TensorRT on a GPU. Without the marker the same bodies run against the stand-in, which
shows that they are written rightly, and nothing about TensorRT.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from fewstep.digits.weights import teacher_folder
from fewstep.errors import FewstepError, RuntimeSettingError
from fewstep.export.merging import load_merged
from fewstep.export.tensorrt.build import build_engine
from fewstep.export.tensorrt.command import TensorRtOptions, make_plans
from fewstep.loading import load_stock_pipeline
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.onnx_session import available_providers
from fewstep.runtime.request import StepEvent
from fewstep.runtime.tensorrt.identity import Engine, Installation
from fewstep.runtime.tensorrt.opening import TensorRtLoader, open_session
from fewstep.runtime.tensorrt.preflight import this_installation
from fewstep.runtime.tensorrt.session import TensorRtSession
from fewstep.runtime.tensorrt.weight_names import PART
from fewstep.runtime.weight_forms import parameter_of
from tests.digits_exports import PROMPTS, Exported, exported
from tests.export.tensorrt.conftest import play
from tests.export.tensorrt.fake_library import TENSORRT_VERSIONS

PIXELS = 1
"""Of 255: float32 on two processors."""
STATES = 1e-3
"""Of the largest value."""
GPU = pytest.param("gpu", marks=pytest.mark.gpu)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@dataclass(frozen=True, slots=True)
class Built:
    """The export, and the engines of all its graphs.

    Attributes:
        made: The export.
        cache: Where engines lie.
        engines: Component -> engine.
    """

    made: Exported
    cache: Path
    engines: dict[str, Engine]

    def loader(self) -> TensorRtLoader:
        """Opens the engines anew."""
        opened = ExportFolder.open(self.made.folder)
        return TensorRtLoader(opened.root, opened.manifest, cache=self.cache)

    def runtime(self) -> FewStepRuntime:
        """The pipeline over the engines."""
        opened = ExportFolder.open(self.made.folder)
        return FewStepRuntime(opened, self.loader(), host_of(opened.manifest.family))

    def session(self, component: str) -> TensorRtSession:
        """One engine."""
        opened = ExportFolder.open(self.made.folder)
        return open_session(opened.root, opened.manifest, component, cache=self.cache)


@pytest.fixture(scope="module", params=[GPU, "stand-in"])
def machine(request: pytest.FixtureRequest) -> Iterator[Installation]:
    """A GPU with TensorRT, or the stand-in for both."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            play(TENSORRT_VERSIONS[-1], patch)
        try:
            here = this_installation()
        except FewstepError as error:
            pytest.skip(str(error))
        yield here


@pytest.fixture(scope="module")
def built(machine: Installation, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Engines of every graph, with the adapter's weights replaceable."""
    made, cache = exported("sd3"), tmp_path_factory.mktemp("engines")
    return Built(made, cache, build(made, cache, machine))


def build(made: Exported, cache: Path, machine: Installation) -> dict[str, Engine]:
    """Build what is not there yet."""
    options = TensorRtOptions(
        folder=made.folder, target=machine.sm, build=True, refit=made.adapter, cache=cache
    )
    plans = make_plans(options)
    return {plan.component: build_engine(plan, Progress(disable=True)) for plan in plans}


def on_cpu(folder: Path) -> FewStepRuntime:
    """What engines are compared with."""
    return FewStepRuntime.load(folder, provider="cpu", threads=1, has_cache=False)


def drawn(runtime: FewStepRuntime, **arguments: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pictures, and the predictions on the way to them."""
    states: list[np.ndarray] = []

    def keep(event: StepEvent) -> None:
        states.append(event.x0)

    return runtime(**arguments, callback=keep).pixels, states


def assert_equal_pixels(found: np.ndarray, wanted: np.ndarray) -> None:
    """Same pictures, but for rounding."""
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= PIXELS


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Same values, but for the order of sums."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=STATES * np.abs(wanted).max())


def test_pictures_and_states_are_the_processors(built: Built) -> None:
    runtime, reference = built.runtime(), on_cpu(built.made.folder)
    picture = np.full((64, 64, 3), 90, np.uint8)
    cases: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "seed": 5},
        {"prompt": PROMPTS, "seed": [1, 2, 3]},
        {"prompt": PROMPTS[1], "seed": 7, "steps": 2},
        {"prompt": PROMPTS[0], "seed": 5},  # from recorded graphs
        {"prompt": PROMPTS[2], "seed": 9, "image": picture, "strength": 0.6},
    ]
    for case in cases:
        pixels, states = drawn(runtime, **case)
        wanted_pixels, wanted_states = drawn(reference, **case)
        assert_equal_pixels(pixels, wanted_pixels)
        assert len(states) == len(wanted_states) > 0
        for found, wanted in zip(states, wanted_states, strict=True):
            assert_near(found, wanted)


def test_one_recorded_graph_holds_the_whole_loop(built: Built) -> None:
    session = built.session("fused")
    fused = FusedRuntime(ExportFolder.open(built.made.folder), session)
    reference = on_cpu(built.made.folder)
    for seed in range(4):  # both sets of buffers are recorded, then played
        assert_equal_pixels(
            fused(PROMPTS[:2], seed=[seed, seed + 50]).pixels,
            reference(PROMPTS[:2], seed=[seed, seed + 50]).pixels,
        )
    assert session.num_graphs == 2


def test_adapters_are_taken_out_and_put_back(built: Built) -> None:
    session, feeds = built.session("transformer"), transformer_feeds()
    base = load_stock_pipeline(teacher_folder("sd3")).components["transformer"]
    pipe = load_merged(teacher_folder("sd3"), built.made.adapter, None).pipe
    merged = pipe.components["transformer"]
    held = built.engines["transformer"].identity.refittable
    names = sorted({parameter_of(name).removeprefix(PART) for name in held})
    assert len(names) >= 4
    first = torch_output(merged, feeds)
    assert np.abs(first - torch_output(base, feeds)).max() > 0.01
    for _ in range(4):
        assert_near(session.run(feeds)["out_hidden_states"], first)
    for model in (base, merged):
        state = model.state_dict()
        session.refit({name: state[name].numpy() for name in names})
        for _ in range(4):  # graphs are recorded again
            assert_near(session.run(feeds)["out_hidden_states"], torch_output(model, feeds))


def transformer_feeds() -> dict[str, np.ndarray]:
    """Two samples at one level."""
    rng = np.random.default_rng(2)
    shapes = {
        "hidden_states": (2, 16, 8, 8),
        "encoder_hidden_states": (2, 9, 128),
        "pooled_projections": (2, 128),
    }
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"timestep": np.array([500], np.float32)}


def torch_output(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' answer."""
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    inputs["timestep"] = inputs["timestep"].expand(2)
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0].numpy()


def test_the_second_start_finds_the_engines(built: Built, machine: Installation) -> None:
    plans = sorted(built.cache.glob("*/engine.plan"))
    assert len(plans) == len(built.engines) >= 6
    written = [file.stat().st_mtime_ns for file in plans]
    first = built.runtime()(PROMPTS, seed=3).pixels
    assert build(built.made, built.cache, machine) == built.engines
    assert [file.stat().st_mtime_ns for file in plans] == written
    np.testing.assert_array_equal(built.runtime()(PROMPTS, seed=3).pixels, first)


@pytest.mark.parametrize("provider", [CUDA, "openvino"])
def test_another_engine_draws_the_processors_pictures(provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    elif provider not in available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider; install onnxruntime-gpu")
    folder = exported("sd3").folder
    try:
        runtime = FewStepRuntime.load(folder, provider=provider, threads=1, has_cache=False)
        pixels, states = drawn(runtime, prompt=PROMPTS, seed=[1, 2, 3])
    except RuntimeSettingError as error:
        if provider != "cuda":
            raise
        pytest.skip(str(error))  # the provider's package without CUDA or a GPU
    wanted_pixels, wanted_states = drawn(on_cpu(folder), prompt=PROMPTS, seed=[1, 2, 3])
    assert runtime.provider == provider
    assert_equal_pixels(pixels, wanted_pixels)
    for found, wanted in zip(states, wanted_states, strict=True):
        assert_near(found, wanted)
