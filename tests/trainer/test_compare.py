"""The comparison: which runs there are, tables that say what was measured, one real tiny run."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import ConfigError
from fewstep.trainer.compare.__main__ import main
from fewstep.trainer.compare.entries import DEFAULTS, MAIN, MODELS, STEPS, Entry, entries
from fewstep.trainer.compare.measure import results
from fewstep.trainer.compare.page import own_steps, table, write_tables
from fewstep.trainer.compare.plots import save_curves
from fewstep.trainer.methods.methods import METHODS


def result(
    name: str, seed: int, frechet: float, made_for: tuple[int, ...] = (4,)
) -> dict[str, Any]:
    rest = {"accuracy": 0.9, "recall": 0.8, "diversity": 7.0}
    scores = {str(count): {"frechet": frechet + count / 100, **rest} for count in STEPS}
    return {
        "name": name, "model": "digits-sd3", "seed": seed, "budget": 60, "evaluations": 64,
        "steps": 10, "made_for": list(made_for), "minutes": 1.5, "peak_gib": 0.5, "scores": scores,
    }  # fmt: skip


def test_every_method_runs_once_and_the_main_ten_with_every_seed() -> None:
    names = (*DEFAULTS, *METHODS)
    found = entries(MODELS, names, 3)
    assert len(MAIN) == 10
    assert set(MAIN) <= set(METHODS)
    for name in names:
        seeds = [e.seed for e in found if e.name == name and e.model == "digits-sd3"]
        assert seeds == ([0, 1, 2] if name in MAIN or name in DEFAULTS else [0])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*DEFAULTS, *METHODS])
def test_all_runs_have_one_budget_and_one_batch(name: str, model: str, tmp_path: Path) -> None:
    config = Entry(name, model, 2).config(tmp_path, 1000)
    assert (config.budget, config.batch_size, config.seed, config.model) == (1000, 32, 2, model)
    shown = {"digits-sd3": 1.2, "digits-sd15": 1.5 if name in DEFAULTS else 2.0}
    assert config.guidance_scale == shown[model]


def test_the_best_method_is_first_and_seeds_become_a_spread() -> None:
    text = table([result("a", 0, 2.0), result("b", 0, 1.0), result("a", 1, 3.0)])
    rows = text.splitlines()[2:]
    assert rows[0].startswith("| b | 4 | 1.01 | 1.02 | **1.04** | 1.08 |")
    assert "| **2.54 +- 0.71** |" in rows[1]
    assert rows[1].endswith("| 2 |")


def test_a_student_is_ranked_at_the_most_steps_it_was_made_for() -> None:
    assert own_steps(result("a", 0, 1.0, (1,))) == 1
    assert own_steps(result("a", 0, 1.0, (1, 2, 4, 8))) == 8
    assert own_steps(result("a", 0, 1.0, (3,))) == 8


def test_tables_are_written_between_the_pages_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "top\n<!-- trained: digits-sd3 -->\nold\n<!-- end -->\nrest\n", encoding="utf-8"
    )
    write_tables(page, [result("a", 0, 2.0)])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("top\n")
    assert text.endswith("<!-- end -->\nrest\n")
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(ConfigError, match="to write between"):
        write_tables(page, [result("a", 0, 2.0)])


def test_curves_are_drawn(tmp_path: Path) -> None:
    save_curves(tmp_path / "c.png", [result("dmd2", 0, 2.0), result("x", 0, 3.0)], "title")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_an_unknown_method_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "nonsense"]) == 2
    assert "method 'nonsense' is unknown" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_is_trained_judged_and_not_repeated(tmp_path: Path) -> None:
    command = [
        "--out", str(tmp_path / "runs"), "--models", "digits-sd3", "--methods", "dmd",
        "--budget", "2000", "--num-seeds", "1", "--jobs", "1",
    ]  # fmt: skip
    assert main(command) == 0
    (found,) = results(tmp_path / "runs")
    assert found["evaluations"] >= 2000
    assert set(found["scores"]) == {"1", "2", "4", "8"}
    file = tmp_path / "runs/digits-sd3/dmd/seed-0/result.json"
    written = file.stat().st_mtime_ns
    assert main(command) == 0
    assert file.stat().st_mtime_ns == written
    assert json.loads(file.read_text(encoding="utf-8"))["made_for"] == [1]
