"""The demo's report keeps its promises honestly; the whole demo runs in the nightly tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.digits.rows import Row
from fewstep.digits.teacher_rows import GUIDANCE_SCALES, TEACHER_STEPS, shipped_rows
from fewstep.recipe import Base, FewStepRecipe, Grid, Schedule
from fewstep.trainer.demo import demo_config, with_even_grids
from fewstep.trainer.demo_pictures import save_curves, save_grid
from fewstep.trainer.demo_report import beside_stock, report_markdown, verdicts


def row(name: Any, steps: int, frechet: float, accuracy: float = 0.95, recall: float = 0.9) -> Row:
    return Row(
        name=name, steps=steps, nfe=steps, frechet=frechet, accuracy=accuracy, precision=0.7,
        recall=recall, density=0.6, coverage=0.5, diversity=9.0, seconds_per_image=0.01,
        num_images=2000, guidance_scale=1.0, sampler="euler", seed=7,
    )  # fmt: skip


def rows_with(frechet: float, accuracy: float = 0.95, recall: float = 0.9) -> list[Row]:
    return [
        row("teacher", 50, 2.0),
        row("teacher", 4, 6.0),
        row("teacher", 4, 9.0),
        row("student", 4, frechet, accuracy, recall),
        row("student", 2, 9.0),
    ]


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        (rows_with(2.4), [True, True, True, True]),
        (rows_with(2.6), [False, True, True, True]),
        (rows_with(3.1), [False, False, True, True]),
        (rows_with(2.0, accuracy=0.90), [True, True, False, True]),
        (rows_with(2.0, recall=0.7), [True, True, True, False]),
    ],
)
def test_each_promise_is_judged_against_the_teacher(rows: list[Row], held: list[bool]) -> None:
    assert [verdict["holds"] for verdict in verdicts(rows)] == held


def test_the_page_says_what_was_missed() -> None:
    rows = rows_with(2.6)
    report = {
        "teacher": "digits-sd3", "guidance_scale": 1.5, "minutes_training": 1.0,
        "minutes_total": 2.0, "frechet_floor": 0.8, "rows": [r.to_dict() for r in rows],
        "verdicts": verdicts(rows), "beside_stock": beside_stock(rows),
    }  # fmt: skip
    page = report_markdown(report)
    assert "| student | euler | 4 | 4 | 2.6 |" in page
    assert page.count("missed") == 1
    assert page.count("holds") == 3


def test_further_grids_leave_the_trained_one_alone() -> None:
    base = Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=3.0))
    trained = Grid(timesteps=(1000.0, 600.0), sigmas=(1.0, 0.6, 0.0))
    recipe = FewStepRecipe(base=base, grids=(trained,), default_steps=2)
    more = with_even_grids(recipe, (4, 2, 1))
    assert [grid.num_steps for grid in more.grids] == [1, 2, 4]
    assert more.grid(2) == trained
    assert more.grid(4).timesteps == pytest.approx((1000.0, 900.0, 750.0, 500.0))


@pytest.mark.parametrize("teacher", ["sd3", "sd15"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_demo_runs_a_named_recipe(teacher: str, quick: bool) -> None:
    config = demo_config(Path("out"), teacher=teacher, quick=quick, seed=3)
    assert config.model == f"digits-{teacher}"
    assert config.seed == 3
    # the epsilon student is taught less guidance than its teacher is shown with
    assert config.guidance_scale == {"sd3": GUIDANCE_SCALES["sd3"], "sd15": 1.5}[teacher]
    assert config.max_sequence_length == (1 if teacher == "sd3" else 0)


def test_the_shipped_teacher_rows_belong_to_the_shipped_weights() -> None:
    """Fails when weights or the scale change and the rows are not measured again."""
    for teacher in ("sd3", "sd15"):
        rows = shipped_rows(teacher)
        assert rows is not None
        assert tuple(row.steps for row in rows) == (*TEACHER_STEPS, 4)
        assert all(row.guidance_scale == GUIDANCE_SCALES[teacher] for row in rows)
        assert all(row.num_images >= 2000 for row in rows)


def test_pictures_are_written(tmp_path: Path) -> None:
    images = np.zeros((3, 64, 64, 3), np.uint8)
    save_grid(tmp_path / "grid.png", {"teacher, 4 steps": images, "student, 4 steps": images})
    lines = [{"step": 1, "loss/dm": 0.1, "eval/frechet": 3.0}, {"step": 2, "loss/dm": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    save_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    for name in ("grid.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 50


@pytest.mark.slow
def test_the_quick_demo_delivers_everything(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "demo",
        "--out",
        str(tmp_path),
        "--quick",
        "--quiet",
    ]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    names = [(r["name"], r["steps"]) for r in report["rows"]]
    assert names[:5] == [
        ("teacher", 50), ("teacher", 4), ("teacher", 4), ("student", 4), ("student", 2)
    ]  # fmt: skip
    assert report["rows"][3]["frechet"] < report["rows"][1]["frechet"]
    for name in ("grid.png", "curves.png", "report.md"):
        assert (tmp_path / name).stat().st_size > 500
    assert list((tmp_path / "adapter").glob("*.safetensors"))
