"""The runtime draws FewStepPipeline's pictures, on every engine, whatever the batch."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import GenerationStopped, RecipeError, RuntimeSettingError
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.providers import AUTOMATIC
from fewstep.runtime.request import StepEvent
from tests.digits_exports import PROMPTS, Teacher, exported

CASES: list[tuple[Teacher, float]] = [("sd3", 0.0), ("sd3", 1.0), ("sd15", 0.5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def runtime(teacher: Teacher = "sd3", stochasticity: float = 0.0, **options: Any) -> FewStepRuntime:
    chosen = {"provider": "cpu", **options}
    return FewStepRuntime.load(exported(teacher, stochasticity).folder, **chosen)


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of two sets of pictures, of 255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(("teacher", "stochasticity"), CASES)
def test_the_pipelines_pictures(teacher: Teacher, stochasticity: float) -> None:
    found = runtime(teacher, stochasticity)(PROMPTS, seed=5, num_images=2).pixels
    wanted = exported(teacher, stochasticity).pictures(
        prompt=PROMPTS, seed=5, num_images_per_prompt=2
    )
    assert furthest(found, wanted) <= 1
    assert found.std() > 10  # pictures, not a grey card


@pytest.mark.parametrize(("teacher", "stochasticity"), CASES)
def test_the_fused_graph_gives_the_same_pixels(teacher: Teacher, stochasticity: float) -> None:
    folder = exported(teacher, stochasticity).folder
    fused = FusedRuntime.load(folder)(PROMPTS, seed=[7, 1, 3]).pixels
    assert furthest(fused, runtime(teacher, stochasticity)(PROMPTS, seed=[7, 1, 3]).pixels) <= 1


@pytest.mark.parametrize("size", [(64, 96), (48, 64), (80, 80)])
def test_other_sizes(size: tuple[int, int]) -> None:
    found = runtime()("a handwritten seven", seed=2, size=size).pixels
    height, width = size
    wanted = exported("sd3").pictures(
        prompt="a handwritten seven", seed=2, height=height, width=width
    )
    assert furthest(found, wanted) <= 1


def test_other_step_counts_are_the_recipes() -> None:
    drawn = runtime()
    found = drawn("a handwritten seven", seed=2, steps=2).pixels
    wanted = exported("sd3").pictures(prompt="a handwritten seven", seed=2, num_inference_steps=2)
    assert furthest(found, wanted) <= 1
    with pytest.raises(RecipeError, match="use 2, 4"):
        drawn("a handwritten seven", steps=3)


def test_openvino_agrees() -> None:
    pytest.importorskip("openvino")
    found = runtime(provider="openvino")(PROMPTS, seed=5).pixels
    assert furthest(found, runtime()(PROMPTS, seed=5).pixels) <= 1


def test_bfloat16_is_near_and_only_by_name() -> None:
    openvino = pytest.importorskip("openvino")
    from fewstep.runtime.openvino_session import capabilities

    assert {"openvino-bf16", "tensorrt"}.isdisjoint(AUTOMATIC)
    if "BF16" not in capabilities(openvino.Core()):
        with pytest.raises(
            RuntimeSettingError, match="no bfloat16 arithmetic .* provider openvino"
        ):
            runtime(provider="openvino-bf16")
        return
    drawn = runtime(provider="openvino-bf16")
    assert drawn.provider == "openvino-bf16"
    found = drawn(PROMPTS, seed=5).pixels.astype(float)
    wanted = runtime()(PROMPTS, seed=5).pixels.astype(float)
    assert 0 < np.square(found - wanted).mean() < 255**2 / 10**3  # above 30 dB


def test_auto_measures_once_and_remembers(tmp_path: Path) -> None:
    pytest.importorskip("openvino")  # with one engine there is nothing to choose
    first = runtime(provider="auto")
    (kept,) = (tmp_path / "cache" / "providers").glob("*.json")
    assert first.provider in ("cpu", "openvino")
    for remembered in ("cpu", "openvino"):
        kept.write_text(f'{{"provider": "{remembered}"}}')
        assert runtime(provider="auto").provider == remembered


def test_it_draws_without_a_place_for_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = runtime()(PROMPTS[0], seed=5).pixels
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    assert np.array_equal(runtime()(PROMPTS[0], seed=5).pixels, wanted)
    assert furthest(runtime(provider="auto")(PROMPTS[0], seed=5).pixels, wanted) <= 1


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    wanted = runtime()(PROMPTS[0], seed=5).pixels
    graphs = list((tmp_path / "cache" / "graphs").glob("*/model.onnx"))
    for graph in graphs:
        graph.write_bytes(b"damaged")
    assert np.array_equal(runtime()(PROMPTS[0], seed=5).pixels, wanted)
    assert all(graph.stat().st_size > 1000 for graph in graphs)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    drawn = runtime("sd3", 1.0)
    together = drawn(PROMPTS, seed=[4, 5, 6]).pixels
    alone = drawn(PROMPTS[1], seed=5).pixels
    assert furthest(together[1:2], alone) <= 1


def test_optimised_graphs_are_kept_and_draw_the_same(tmp_path: Path) -> None:
    first = runtime()(PROMPTS, seed=5).pixels
    kept = list((tmp_path / "cache" / "graphs").glob("*/model.onnx"))
    assert len(kept) == 4  # two text encoders, transformer, decoder
    assert np.array_equal(first, runtime()(PROMPTS, seed=5).pixels)


def test_the_prompt_cache_encodes_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = runtime()
    first = drawn(PROMPTS, seed=5).pixels
    host = drawn._host
    monkeypatch.setattr(host, "encode", lambda prompts: pytest.fail(f"encoded {prompts} again"))
    assert np.array_equal(first[1:2], drawn(PROMPTS[1], seed=6).pixels)


def test_image_to_image_is_the_pipelines() -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    from fewstep.pipeline import FewStepPipeline

    made = exported("sd3", 1.0)
    start = Image.fromarray(made.pictures(prompt=PROMPTS[0], seed=1)[0])
    stock = StableDiffusion3Img2ImgPipeline(**made.pipe.components)
    pipe: Any = FewStepPipeline.wrap(stock)
    pipe.set_progress_bar_config(disable=True)
    wanted = np.stack(
        [
            np.asarray(one)
            for one in pipe(prompt=PROMPTS[1], image=start, strength=0.75, seed=9).images
        ]
    )
    found = runtime("sd3", 1.0)(PROMPTS[1], image=start, strength=0.75, seed=9).pixels
    assert furthest(found, wanted) <= 1


def test_callback_and_preview() -> None:
    seen: list[StepEvent] = []
    runtime()("a handwritten seven", callback=seen.append)
    assert [(event.index, event.num_steps) for event in seen] == [(i, 4) for i in range(4)]
    assert seen[0].preview()[0].size == (64, 64)


def test_stop_between_steps() -> None:
    stop = threading.Event()
    with pytest.raises(GenerationStopped, match="after 2 of 4 steps"):
        runtime()("x", callback=lambda e: stop.set() if e.index == 1 else None, stop=stop)


def test_stop_in_the_last_step_leaves_nothing_to_decode() -> None:
    stop = threading.Event()
    drawn = runtime()
    with pytest.raises(GenerationStopped, match="after 4 of 4 steps"):
        drawn("x", callback=lambda e: stop.set() if e.index == 3 else None, stop=stop)
    assert "vae_decoder" not in drawn._sessions


def test_threads_do_not_mix_pictures() -> None:
    drawn = runtime("sd3", 1.0)
    wanted = {seed: drawn(PROMPTS[seed % 3], seed=seed).pixels for seed in range(6)}
    found: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        found[seed] = drawn(PROMPTS[seed % 3], seed=seed).pixels

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], wanted[seed]) for seed in wanted)


def test_a_long_prompt_is_cut_aloud() -> None:
    with pytest.warns(UserWarning, match="cut was: .*eight nine ten"):
        runtime()("one two three four five six seven eight nine ten eight nine ten")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": (60, 64)}, "nearest is 64x64"),
        ({"size": (0, 64)}, "must be multiples of 16"),
        ({"num_images": 0}, "at least 1"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"image": "missing.png"}, "cannot be read"),
    ],
)
def test_wrong_requests(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeSettingError, match=said):
        runtime()("a handwritten seven", **arguments)


def test_unknown_and_missing_providers() -> None:
    with pytest.raises(RuntimeSettingError, match="'toaster' is unknown"):
        runtime(provider="toaster")
    with pytest.raises(RuntimeSettingError, match="no cuda provider"):
        runtime(provider="cuda")


def test_neither_torch_nor_diffusers_nor_transformers_is_imported() -> None:
    program = (
        "import sys\n"
        "from fewstep.runtime.few_step_runtime import FewStepRuntime\n"
        f"runtime = FewStepRuntime.load({str(exported('sd3').folder)!r}, provider='cpu')\n"
        "runtime('a handwritten one')\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
