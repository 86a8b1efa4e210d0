"""docs/methods.md says what docs/methods.json holds, and the command that makes both works."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewstep.digits.judge import DigitsJudge
from fewstep.digits.weights import teacher_folder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "docs" / "methods.json"
TRAINING_FREE = {
    "stock scheduler",
    "even grid, Euler/DDIM",
    "optimal steps (OSS)",
    "D-ODE on the even grid",
    "D-ODE on optimal steps",
    "Bespoke RK1",
    "Bespoke RK2 (half the steps)",
}


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    """benchmarks/methods.py, which is no package."""
    spec = importlib.util.spec_from_file_location("methods", ROOT / "benchmarks" / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]


def test_the_page_shows_the_results(methods: Any, rows: list[dict[str, Any]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    kinds = {(row["base"], row["network"]) for row in rows}
    assert kinds == {
        ("digits-sd3", "teacher"),
        ("digits-sd15", "teacher"),
        ("digits-sd3", "student"),
    }
    for base, network in kinds:
        assert methods.marker(base, network) in text
        assert methods.table(rows, base, network) in text


def test_every_row_is_three_seeds_of_a_thousand_pictures(rows: list[dict[str, Any]]) -> None:
    seeds: dict[tuple[str, str, str, int], list[int]] = {}
    for row in rows:
        assert row["num_images"] == 1000
        key = (row["base"], row["network"], row["method"], row["calls"])
        seeds.setdefault(key, []).append(row["seed"])
    assert all(sorted(found) == [0, 1, 2] for found in seeds.values())
    for base in ("digits-sd3", "digits-sd15"):
        for calls in (2, 4, 8):
            found = {key[2] for key in seeds if key[:2] == (base, "teacher") and key[3] == calls}
            assert found >= TRAINING_FREE
    assert ("digits-sd15", "teacher", "noise correction", 4) in seeds


@pytest.mark.parametrize("base", ["digits-sd3", "digits-sd15"])
def test_fitted_solvers_beat_the_plain_ones_they_start_from(
    base: str, rows: list[dict[str, Any]]
) -> None:
    """In distribution, not only in the distance they were fitted to."""

    def frechet(method: str, calls: int) -> float:
        found = [
            row["frechet"]
            for row in rows
            if (row["base"], row["method"], row["calls"]) == (base, method, calls)
            and row["network"] == "teacher"
        ]
        return statistics.mean(found)

    for calls in (2, 4):
        assert frechet("D-ODE on the even grid", calls) < frechet("even grid, Euler/DDIM", calls)


def test_cells_are_mean_and_standard_deviation(methods: Any) -> None:
    assert methods.cell([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert methods.cell([]) == "-"
    assert methods.plain_mean([0.5, 0.75]) == "0.625"


def test_a_page_without_a_place_for_a_table_is_refused(methods: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here", encoding="utf-8")
    row = {"base": "digits-sd3", "network": "teacher", "method": "Bespoke RK1", "calls": 2}
    with pytest.raises(SystemExit, match="has no line <!-- rows: digits-sd3 teacher -->"):
        methods.write_page(page, [row])


def test_a_run_measures_what_is_missing_and_keeps_the_rest(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real rows of few pictures: the searched grid is drawn, judged, stored, and not made again."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    assert teacher_folder("sd3").exists()
    monkeypatch.setattr(methods, "CALLS", (2,))
    monkeypatch.setattr(methods, "FIT_PICTURES", {"digits-sd3": 2})
    bench = methods.Bench("digits-sd3", DigitsJudge(), 20, None)
    wanted = ("even grid, Euler/DDIM", "optimal steps (OSS)")

    def cases(bench: Any, seed: int) -> Any:
        return (case for case in methods.teacher_cases(bench, seed) if case.method in wanted)

    monkeypatch.setattr(methods, "wanted", lambda bench, rows: [cases])
    out = tmp_path / "methods.json"
    methods.measure(bench, (0,), "teacher", out)
    first = out.read_text(encoding="utf-8")
    rows = json.loads(first)["rows"]
    assert {row["method"] for row in rows} == set(wanted)
    assert all(row["nfe"] == 4 and row["frechet"] > 0.0 for row in rows)
    methods.measure(bench, (0,), "teacher", out)
    assert out.read_text(encoding="utf-8") == first
