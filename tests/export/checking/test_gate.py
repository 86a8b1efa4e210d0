"""The gate sees what is wrong, and nothing where nothing is."""

import io
import json
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from fewstep.errors import ExportError, ExportFolderError
from fewstep.export.checking.drawing import Drawing, cases_of
from fewstep.export.checking.findings import Findings
from fewstep.export.checking.inspecting import inspect
from fewstep.export.checking.kernels import uncovered
from fewstep.export.checking.limits import EQUAL_DB, FLOAT32, NO_NUMBER, SLOWER, is_within, shown
from fewstep.export.checking.overflow import scan
from fewstep.export.checking.parity import (
    compare_component,
    compare_pictures,
    difference,
    relative_rms,
)
from fewstep.export.checking.report import amplified, to_html
from fewstep.export.checking.speed import compare_times, is_worth_another
from fewstep.export.checking.torch_engine import TorchSession, torch_threads
from fewstep.export.onnx_command import OnnxOptions
from fewstep.export.onnx_command import run as export
from fewstep.runtime.manifest import Graph, Measured, read_manifest
from fewstep.runtime.session import Feeds
from tests.digits_exports import exported
from tests.export.checking.asked import told, with_weight
from tests.export.quantizing.folders import copied, feeds, source

GRAPH = "transformer/model.onnx"


def figures(folder: Path, what: str, unit: str) -> list[float]:
    return [m.value for m in read_manifest(folder).measured if (m.what, m.unit) == (what, unit)]


def test_an_export_is_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, report = copied(tmp_path / "out"), tmp_path / "report.html"
    base = {"base": "digits-sd3", "adapter": str(exported("sd3").adapter)}
    threads, once = set(), TorchSession.run

    def watched(session: TorchSession, *given: Any) -> dict[str, np.ndarray]:
        threads.add(torch.get_num_threads())
        return once(session, *given)

    monkeypatch.setattr(TorchSession, "run", watched)
    # on a machine at work the time may be missed: see below
    with torch_threads(2), suppress(ExportError):
        told(folder, **base, report=report, threads=1)
    assert threads == {1}
    assert max(figures(folder, "latents", "max error")) < FLOAT32.latents  # pyright: ignore[reportOperatorIssue]
    assert min(figures(folder, "image", "dB")) > FLOAT32.psnr_db
    assert max(figures(folder, "image", "max error of 255")) <= 1
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder"):
        assert max(figures(folder, name, "relative error")) < 1e-4
    where = {m.where for m in read_manifest(folder).measured if m.what == "image"}
    assert {"odd aspect, 64x48", "longest prompt, 64x64", "one picture, 64x64"} <= where
    missed = {m.unit for m in read_manifest(folder).measured if not is_within(m)}
    assert missed <= {"ratio of time"}
    assert read_manifest(folder).verified == (not missed)
    assert max(figures(folder, "fused", "of 255")) <= 1
    times = [m for m in read_manifest(folder).measured if m.unit == "ratio of time"]
    assert {m.what for m in times if m.limit == SLOWER} == {"picture", "fused"}
    assert "difference" in report.read_text(encoding="utf-8")


def test_a_changed_weight_is_seen_and_named(tmp_path: Path) -> None:
    folder = copied(tmp_path / "out")
    with_weight(folder, 1.5)
    with pytest.raises(ExportFolderError):
        told(folder, against=source().root)
    with pytest.raises(ExportError, match=r"refused: .*transformer .*relative error.*latents"):
        told(folder, against=source().root, rewrite=True)
    manifest = read_manifest(folder)
    assert not manifest.verified
    missed = {m.what for m in manifest.measured if not is_within(m)}
    assert "transformer" in missed
    assert not {"text_encoder", "vae_decoder"} & {m.what for m in manifest.measured}  # unchanged


def test_numbers_that_are_none_are_found(tmp_path: Path) -> None:
    folder = copied(tmp_path / "out")
    clean = scan(folder / GRAPH, feeds()[:1])
    assert clean.bad == ()
    assert clean.values > 200
    assert 1 < clean.largest < 65504
    with_weight(folder, np.inf)
    found = scan(folder / GRAPH, feeds()[:1])
    assert found.bad_outputs == ("out_hidden_states",)
    with pytest.raises(ExportError, match="transformer gives numbers that are none"):
        told(folder, rewrite=True)


def test_without_a_reference_nothing_is_claimed() -> None:
    said = told(source().root)
    assert "parity was not looked at" in said
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder"):
        assert re.search(rf"^{name}: \d+ values looked at", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "digits-sd3", "against": Path("x")}, "both given"),
        ({"adapter": "a.safetensors"}, "give it too"),
        ({"against": Path("missing")}, "does not exist"),
    ],
)
def test_requests_that_cannot_be_served(changes: dict, said: str) -> None:
    with pytest.raises((ExportError, ExportFolderError), match=said):
        told(source().root, **changes)


def test_a_missing_list_of_prompts_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    missing = tmp_path / "prompts.txt"
    options = OnnxOptions(base="no/such/model", out=tmp_path / "out", prompts=missing)
    with pytest.raises(ExportError, match=r"prompts\.txt cannot be read .*; give a text file"):
        export(options, Console(file=io.StringIO()))


def test_folders_of_other_models_are_not_compared(tmp_path: Path) -> None:
    folder = copied(tmp_path / "out")
    recipe = json.loads((folder / "fewstep_recipe.json").read_text())
    recipe["grids"], recipe["default_steps"] = recipe["grids"][:1], 2
    (folder / "fewstep_recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ExportError, match="sampled by different recipes"):
        told(folder, against=source().root, rewrite=True)


def test_kernels_are_known(tmp_path: Path) -> None:
    assert uncovered(source().root / "vae_decoder/model.onnx") == ()
    model = onnx.load(source().root / GRAPH, load_external_data=False)
    model.graph.node[0].op_type = "NotAnOperator"
    onnx.save(model, tmp_path / "m.onnx")
    assert "NotAnOperator-18" in uncovered(tmp_path / "m.onnx")


def test_cases_cover_the_shapes() -> None:
    one, odd, long, rest = cases_of(source(), ["a", "b", "c"])
    assert len(one.prompts) == 1
    assert odd.size == (64, 48)
    assert len(odd.prompts) == 2
    assert len(long.prompts[0].split()) > 77
    assert rest.prompts == ("a", "b", "c")
    several = cases_of(source(), [str(index) for index in range(200)])[-1]
    assert (several.name, several.prompts) == ("4 prompts", ("0", "1", "2", "3"))


def test_twice_the_time_is_slower_and_equal_time_is_not() -> None:
    slow = compare_times("x", "here", lambda _: time.sleep(0.01), lambda _: time.sleep(0.03))
    same = compare_times("x", "here", lambda _: time.sleep(0.03), lambda _: time.sleep(0.01))
    assert slow.ratio > 1.5
    assert same.ratio < 1
    found = Findings("this folder", "another", measured=slow.measured(SLOWER))
    assert not found.is_good
    with pytest.raises(ExportError, match=r"x takes [\d.]+ x the time of what it replaces, at mo"):
        found.require()
    found.require(force=True)
    assert replace(found, measured=same.measured(SLOWER)).is_good


def test_what_is_slow_is_repeated_less() -> None:
    last = {s: next(n for n in range(99) if not is_worth_another(n, s)) for s in (0, 5, 31)}
    assert last == {0: 41, 5: 7, 31: 3}


def test_equal_pictures_are_equal() -> None:
    case = cases_of(source(), ["a"])[0]
    pixels = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.uint8)
    largest, psnr, ssim = compare_pictures(case, pixels, pixels, FLOAT32)
    assert (largest.value, psnr.value, ssim.value) == (0, EQUAL_DB, 1)
    assert all(is_within(m) for m in (largest, psnr, ssim))
    other = pixels.copy()
    other[0, 0, 0] ^= 128
    assert compare_pictures(case, pixels, other, FLOAT32)[0].value == 128


def test_what_is_no_number_misses_every_limit() -> None:
    good = np.ones(2)
    for bad in (np.array([1.0, np.nan]), np.array([np.inf, 1.0])):
        for pair in ((good, bad), (bad, good), (bad, bad)):
            assert difference(*pair) == NO_NUMBER
            assert relative_rms(*pair) == NO_NUMBER
    found = Measured(what="x", where="y", value=NO_NUMBER, unit="max error", limit=1.0)
    assert not is_within(found)
    assert shown(found.value) == "no number"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_is_a_finite_number(value: float) -> None:
    with pytest.raises(ExportFolderError, match="measured.value must be a finite number"):
        Measured(what="x", where="y", value=value, unit="max error")


@dataclass(slots=True)
class Constant:
    """A session whose answer is known."""

    answer: np.ndarray
    graph: Graph = field(default_factory=lambda: source().manifest.graphs["vae_decoder"])
    provider: str = "none"

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {"sample": self.answer}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("is_reference", [False, True])
def test_one_bad_number_in_one_call_is_an_error_of_the_component(
    bad: float, is_reference: bool
) -> None:
    sessions = [Constant(np.array([2.0, bad])), Constant(np.array([2.0, 1.0]))]
    first, second = sessions if is_reference else sessions[::-1]
    for one in compare_component("x", "here", (first, second), [{}], 1e-3):
        assert one.value == NO_NUMBER
    same = compare_component("x", "here", (sessions[1], sessions[1]), [{}], 1e-3)
    assert [one.value for one in same] == [0.0, 0.0]


def test_the_first_call_is_looked_at_as_the_last_is() -> None:
    for spoiled in (0, 3):
        calls = list(feeds()[:4])
        bad = calls[spoiled]["hidden_states"] * np.float32(np.nan)
        calls[spoiled] = {**calls[spoiled], "hidden_states": bad}
        drawing = Drawing({"transformer": calls}, (), np.zeros((1, 64, 64, 3), np.uint8))
        problems, notes = inspect(source(), drawing, lambda _: None)
        assert problems == ("transformer gives numbers that are none in ('out_hidden_states',)",)
        assert "vae_decoder: no drawing calls it, nothing inside it was looked at" in notes


def test_torch_has_as_many_threads_as_the_graphs() -> None:
    before = torch.get_num_threads()
    with torch_threads(2):
        with torch_threads(0):
            assert torch.get_num_threads() == 2
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_differences_are_multiplied_until_they_are_seen() -> None:
    wanted = np.zeros((8, 8, 3), np.uint8)
    found = wanted.copy()
    found[0, 0, 0] = 3
    gap, gain = amplified(wanted, found)
    assert (gap.max(), gain) == (96, 32)
    assert amplified(wanted, wanted)[1] == 0
    found[0, 0, 0] = 200
    assert amplified(wanted, found)[1] == 1


def test_a_report_escapes_what_users_wrote() -> None:
    page = to_html(Findings("<script>", None, notes=("a & b",)))
    assert "<script>" not in page
    assert "a &amp; b" in page
