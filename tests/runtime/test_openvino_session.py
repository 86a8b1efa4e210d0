"""OpenVINO's compiled graphs are kept, drawn from in place, and made again where damaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.digits_exports import exported

openvino = pytest.importorskip("openvino")

from fewstep.runtime.openvino_session import bfloat16_bits, capabilities  # noqa: E402

PROMPT = "a handwritten seven"
ENGINES = ["openvino"]
if "BF16" in capabilities(openvino.Core()):
    ENGINES.append("openvino-bf16")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "other": lambda whole: b"no compiled graph",
    "cut": lambda whole: whole[: len(whole) // 2],
    "end": lambda whole: whole[:-1000],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def draw(engine: str, *, has_cache: bool = True) -> np.ndarray:
    folder = exported("sd15").folder
    loaded = FewStepRuntime.load(folder, provider=engine, has_cache=has_cache)
    return loaded(PROMPT, seed=5).pixels


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "openvino").iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_graphs_are_kept_and_draw_the_same(engine: str, tmp_path: Path) -> None:
    first = draw(engine)
    there = kept(tmp_path)
    assert [path.suffix for path in there] == [".blob"] * 3  # text encoder, UNet, decoder
    written = [path.stat().st_mtime_ns for path in there]
    assert np.array_equal(draw(engine), first)
    assert kept(tmp_path) == there
    assert [path.stat().st_mtime_ns for path in there] == written
    furthest = np.abs(draw(engine, has_cache=False).astype(int) - first).max()
    assert furthest <= (0 if engine == "openvino" else 8)  # 16-bit weights are rounded once more


def test_each_engine_keeps_its_own_and_bfloat16_half_of_it(tmp_path: Path) -> None:
    if "openvino-bf16" not in ENGINES:
        pytest.skip("this processor has no bfloat16 arithmetic")
    draw("openvino")
    whole = kept(tmp_path)
    draw("openvino-bf16")
    narrow = [path for path in kept(tmp_path) if path not in whole]
    assert len(narrow) == len(whole)
    sizes = [sum(path.stat().st_size for path in some) for some in (narrow, whole)]
    assert sizes[0] < 0.62 * sizes[1]


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    rng = np.random.default_rng(0)
    shape = (3, 1001)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-30, 30, shape)
    values = np.concatenate([values, [[1 + 2.0**-8] * 1001], [[1 + 3 * 2.0**-8] * 1001]])  # ties
    for given in (values.astype(np.float32), values.clip(-60000, 60000).astype(np.float16)):
        wanted = torch.from_numpy(given).to(torch.bfloat16).view(torch.int16).numpy()
        assert np.array_equal(bfloat16_bits(given), wanted.view(np.uint16))
    assert bfloat16_bits(np.array(1.0, np.float32)).shape == ()
    assert bfloat16_bits(np.zeros((0, 2), np.float32)).shape == (0, 2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_made_again(damage: str, tmp_path: Path) -> None:
    first = draw("openvino")
    whole = {path: path.read_bytes() for path in kept(tmp_path)}
    for path, content in whole.items():
        path.write_bytes(DAMAGES[damage](content))
    assert np.array_equal(draw("openvino"), first)
    assert kept(tmp_path) == sorted(whole)
    for path, content in whole.items():  # names that OpenVINO makes up differ in length
        assert path.stat().st_size == pytest.approx(len(content), rel=0.01)


def test_nothing_is_kept_where_nothing_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw("openvino")
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    assert np.array_equal(draw("openvino"), first)
