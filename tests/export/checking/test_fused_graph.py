"""The fused graph is held against the components that lie beside it."""

from pathlib import Path

import pytest

from fewstep.errors import ExportError
from fewstep.export.checking.drawing import cases_of, draw
from fewstep.export.checking.fused_graph import FusedBeside
from fewstep.export.checking.limits import SLOWER, is_within
from fewstep.export.checking.reference import onnx_loader
from fewstep.export.checking.report_tables import figure_tables
from fewstep.export.fused.fusing import add_fused
from fewstep.export.onnx_folder import write_manifest
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Measured, read_manifest
from tests.export.checking.asked import known_as, timed, told, with_weight
from tests.export.quantizing.folders import PROMPTS, copied, source


def of_fused(folder: Path) -> list[Measured]:
    return [m for m in read_manifest(folder).measured if m.what == "fused"]


def test_a_changed_one_is_refused_and_its_figures_are_kept(tmp_path: Path) -> None:
    reference = known_as(tmp_path / "reference", verified=True)
    folder = copied(tmp_path / "out")
    with_weight(folder, 3.0, "fused")
    said = r"refused: fused \(.*\) is \d+ of 255 away, wanted at most 1 \("
    with timed(1.0), pytest.raises(ExportError, match=said):
        told(folder, against=reference, rewrite=True)
    assert not read_manifest(folder).verified
    pixels = [m for m in of_fused(folder) if m.unit == "of 255"]
    assert [m.where for m in pixels] == [
        "one picture, 64x64, 4 steps",
        "longest prompt, 64x64, 4 steps",
        "3 prompts, 64x64, 4 steps",
    ]
    assert not any(is_within(m) for m in pixels)


def test_its_pixels_and_its_time_are_measured(tmp_path: Path) -> None:
    reference = known_as(tmp_path / "reference", verified=True)
    folder = known_as(tmp_path / "out", verified=False)
    with timed(1.0):
        told(folder, against=reference)
    assert read_manifest(folder).verified
    assert max(m.value for m in of_fused(folder) if m.unit == "of 255") <= 1
    (time,) = (m for m in of_fused(folder) if m.unit == "ratio of time")
    assert time.limit == SLOWER
    assert time.where.startswith("beside components, 64x64, 4 steps")
    tables = dict(figure_tables(of_fused(folder)))
    assert list(tables) == ["The fused graph"]


def test_a_slower_one_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "out")
    with timed(1.1), pytest.raises(ExportError, match=r"fused takes 1\.1 x the time"):
        told(folder, against=source().root)


def test_one_of_fewer_steps_is_held_against_as_many(tmp_path: Path) -> None:
    folder = copied(tmp_path / "out")
    manifest = add_fused(folder, source().manifest, source().recipe, 2)
    write_manifest(folder, manifest)
    opened = ExportFolder.open(folder)
    loader = onnx_loader(opened, 1)
    cases = cases_of(opened, PROMPTS[:1])[:2]
    beside = FusedBeside.load(opened, loader, onnx_loader(opened, 1))
    (found,) = beside.pixels(cases, [draw(opened, loader, case) for case in cases])
    assert found.where == "one picture, 64x64, 2 steps"  # the odd aspect it cannot draw
    assert found.value <= 1
