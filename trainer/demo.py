"""`fewstep demo`: distil a shipped teacher, draw with the student, judge both, write a report."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fewstep.digits.data import balanced_prompts
from fewstep.digits.draw import picture_seeds
from fewstep.digits.evaluate import judge_real, judge_student, load_student
from fewstep.digits.judge import DigitsJudge
from fewstep.digits.rows import Row
from fewstep.digits.teacher_rows import (
    NUM_IMAGES,
    REPORT_SEED,
    TEACHER_STEPS,
    measure_rows,
    shipped_rows,
)
from fewstep.digits.teacher_sampler import load_teacher, teacher_images
from fewstep.digits.weights import teacher_folder, weights_checksum
from fewstep.noise_schedule import NoiseSchedule
from fewstep.recipe import FewStepRecipe, Grid
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.demo_pictures import save_curves, save_grid
from fewstep.trainer.demo_report import beside_stock, report_markdown, verdicts
from fewstep.trainer.loop import train
from fewstep.trainer.progress import TrainProgress
from fewstep.trainer.recipes import RECIPES

STUDENT_STEPS = (4, 2, 1)
COLUMNS = 20


def run_demo(out: Path, *, quick: bool, full: bool, teacher: str, seed: int, quiet: bool) -> None:
    """Run the whole demo.

    Args:
        out: Folder for adapter/, grid.png, curves.png, report.json and report.md.
        quick: A shorter training.
        full: Judge the teacher here instead of using the rows shipped with its weights.
        teacher: "sd3" or "sd15".
        seed: Of the training.
        quiet: No progress bars.

    Raises:
        FewstepError: The run folder in `out` holds a run with other settings.
    """
    started = time.perf_counter()
    console = Console(stderr=True, quiet=quiet)
    config = demo_config(out, teacher=teacher, quick=quick, seed=seed)
    console.print(f"distilling digits-{teacher} into {config.grid.num_steps} steps")
    with TrainProgress(console, is_quiet=quiet) as progress:
        result = train(config, progress.report)
    if result.was_interrupted or result.adapter is None:
        raise KeyboardInterrupt
    adapter = publish(result.adapter, out)
    trained = time.perf_counter()
    judge, base = DigitsJudge(), teacher_folder(teacher)
    with Progress(console=console, disable=quiet) as bars:
        rows = (None if full else shipped_rows(teacher)) or measure_rows(teacher, bars)
        students, pictures = _student_rows(judge, base, adapter, bars)
        rows += [*students, judge_real(judge)]
        _save_pictures(out, config, base, pictures, bars)
    report = {
        "teacher": f"digits-{teacher}",
        "weights_sha256": weights_checksum(),
        "guidance_scale": config.guidance_scale,
        "training_seed": seed,
        "picture_seed": REPORT_SEED,
        "quick": quick,
        "minutes_training": (trained - started) / 60.0,
        "minutes_total": (time.perf_counter() - started) / 60.0,
        "frechet_floor": judge.frechet_floor(NUM_IMAGES),
        "rows": [row.to_dict() for row in rows],
        "verdicts": verdicts(rows),
        "beside_stock": beside_stock(rows),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report_markdown(report), encoding="utf-8")
    console.print(f"written: {out / 'report.md'}, {out / 'grid.png'}, {adapter}")


def demo_config(out: Path, *, teacher: str, quick: bool, seed: int) -> TrainConfig:
    """The trainer recipe the demo runs: digits-4step or its quick form."""
    name = f"digits-{teacher}-4step" if teacher != "sd3" else "digits-4step"
    recipe = RECIPES[f"{name}-quick" if quick else name]
    return dataclasses.replace(recipe.config, out=out / "run" / name, seed=seed)


def publish(adapter: Path, out: Path) -> Path:
    """Copy the run's adapter to `out`/adapter, whole or not at all."""
    final = out / "adapter" / adapter.name
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(final.name + ".tmp")
    temporary.write_bytes(adapter.read_bytes())
    temporary.replace(final)
    return final


def with_even_grids(recipe: FewStepRecipe, counts: tuple[int, ...]) -> FewStepRecipe:
    """The recipe with an evenly spaced grid for each further step count."""
    schedule: NoiseSchedule = recipe.base.schedule.build()
    grids = {grid.num_steps: grid for grid in recipe.grids}
    for count in counts:
        timesteps = schedule.uniform_timesteps(count)
        sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
        grids.setdefault(count, Grid(timesteps=timesteps, sigmas=sigmas))
    return dataclasses.replace(recipe, grids=tuple(grids[n] for n in sorted(grids)))


def _student_rows(
    judge: DigitsJudge, base: Path, adapter: Path, bars: Progress
) -> tuple[list[Row], dict[str, np.ndarray]]:
    from fewstep.adapters import read_header

    recipe = read_header(adapter).recipe()
    assert recipe is not None  # the trainer wrote it a moment ago
    pipe: Any = load_student(base, adapter, with_even_grids(recipe, STUDENT_STEPS))
    rows, pictures = [], {}
    for count in STUDENT_STEPS:
        judged = judge_student(
            pipe, judge, num_steps=count, num_images=NUM_IMAGES, seed=REPORT_SEED, progress=bars
        )
        rows.append(judged.row)
        pictures[f"student, {count} step{'s' if count > 1 else ''}"] = judged.images[:COLUMNS]
    return rows, pictures


def _save_pictures(
    out: Path, config: TrainConfig, base: Path, students: dict[str, np.ndarray], bars: Progress
) -> None:

    prompts, _ = balanced_prompts(COLUMNS)
    pipe = load_teacher(base)
    rows = {
        f"teacher, {count} steps": teacher_images(
            pipe,
            prompts,
            picture_seeds(REPORT_SEED, COLUMNS),
            num_steps=count,
            guidance_scale=config.guidance_scale,
            progress=bars,
        ).images
        for count in TEACHER_STEPS
    }
    save_grid(out / "grid.png", {**rows, **students})
    save_curves(out / "curves.png", config.out / "metrics.jsonl")
