"""ONNX Runtime's kept graphs: weights lie in them arranged for the processor, and draw the same."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import chosen_components, quantize_into
from fewstep.export.quantizing.schemes import Int4, Int8Dynamic, Int8Static, Scheme
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.onnx_session import OnnxLoader
from tests.digits_exports import PROMPTS, exported


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def drawn(folder: Path, *, has_cache: bool) -> np.ndarray:
    loaded = FewStepRuntime.load(folder, provider="cpu", threads=2, has_cache=has_cache)
    return loaded(PROMPTS, seed=5).pixels


def kept(root: Path) -> list[Path]:
    return sorted((root / "cache" / "graphs").glob("*/model.onnx_data"))


def check(folder: Path, root: Path) -> None:
    """Without a copy, with the one being made, and from it: the same bits."""
    wanted = drawn(folder, has_cache=False)
    assert kept(root) == []
    for _ in range(2):
        assert np.array_equal(drawn(folder, has_cache=True), wanted)
        assert len(kept(root)) >= 3


def test_a_float_folder(tmp_path: Path) -> None:
    check(exported("sd3").folder, tmp_path)


def test_convolutions(tmp_path: Path) -> None:
    check(exported("sd15").folder, tmp_path)


@pytest.mark.parametrize(
    "scheme", [Int8Dynamic(), Int8Static(), Int4()], ids=lambda scheme: scheme.precision
)
def test_quantized_folders(scheme: Scheme, tmp_path: Path) -> None:
    source, folder = ExportFolder.open(exported("sd3").folder), tmp_path / "out"
    plan = Plan(
        scheme, chosen_components(source, ()), parse_skips([]), tuple(PROMPTS[:2]), threads=2
    )
    folder.mkdir()
    quantize_into(source, folder, plan, progress=lambda _: None)
    check(folder, tmp_path)


def test_the_fused_graph(tmp_path: Path) -> None:
    folder = exported("sd3").folder
    wanted = FusedRuntime.load(folder, threads=2, has_cache=False)(PROMPTS, seed=5).pixels
    for _ in range(2):
        assert np.array_equal(FusedRuntime.load(folder, threads=2)(PROMPTS, seed=5).pixels, wanted)
    assert len(kept(tmp_path)) == 1


def test_arranged_weights_lie_beside_the_others(tmp_path: Path) -> None:
    opened = ExportFolder.open(exported("sd3").folder)
    graph = opened.manifest.graphs["transformer"]
    OnnxLoader(opened.root, opened.manifest.files, threads=2).load(graph)
    (copy,) = kept(tmp_path)
    whole = (opened.root / f"{graph.file}_data").stat().st_size
    assert whole * 1.5 < copy.stat().st_size < whole * 2.5  # nearly all of it is multiplied with


@pytest.mark.parametrize("left", [0, 0.3, 0.9])
def test_a_copy_cut_short_is_made_again(left: float, tmp_path: Path) -> None:
    folder = exported("sd3").folder
    wanted = drawn(folder, has_cache=True)
    whole = {file: file.stat().st_size for file in kept(tmp_path)}
    for file, size in whole.items():
        with file.open("r+b") as stream:
            stream.truncate(int(size * left))
    assert np.array_equal(drawn(folder, has_cache=True), wanted)
    assert {file: file.stat().st_size for file in kept(tmp_path)} == whole
