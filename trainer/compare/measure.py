"""One run of the comparison: train under the budget, judge at every step count."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.digits.judge import DigitsJudge
from fewstep.trainer.compare.entries import STEPS, Entry
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.generate import generate, student_speaker
from fewstep.trainer.loop import drive
from fewstep.trainer.meters import peak_memory
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import write_json
from fewstep.trainer.setup import build_run, path_of

NUM_IMAGES = 1000
FIRST_SEED = 600_000_000
"""Image seeds that no training and no evaluation during training uses."""


def measure(entry: Entry, root: Path, budget: int) -> dict[str, Any]:
    """Train and judge one entry, and write its result.json.

    Returns:
        What the file holds: settings, minutes of one core, memory, scores by step count.
    """
    config = entry.config(root, budget)
    run = build_run(config)
    started = time.process_time()  # of one thread: a busy machine does not show in it
    drive(run)
    minutes = (time.process_time() - started) / 60.0
    memory, judge = peak_memory(torch.device("cpu")), DigitsJudge()
    result = {
        **dataclasses.asdict(entry),
        "budget": budget,
        "evaluations": run.evaluations,
        "steps": run.step,
        "made_for": list(config.grid.all_steps),
        "minutes": minutes,
        "peak_gib": memory.get("memory/peak_gib"),
        "parameters": sum(p.numel() for p in run.setting.cast.parameters(Role.STUDENT))
        if run.setting.cast.has(Role.STUDENT)
        else None,
        "scores": {str(count): judge_steps(run, judge, count) for count in STEPS},
    }
    write_json(entry.folder(root) / "result.json", result)
    return result


def judge_steps(run: Run, judge: DigitsJudge, num_steps: int) -> dict[str, float]:
    """Scores of the averaged student at one step count, on its own grid or the even one."""
    images, labels = draw_images(run, num_steps, NUM_IMAGES)
    return dataclasses.asdict(judge.score(images, labels))


def draw_images(run: Run, num_steps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, H, W, 3) of the averaged student, digits in turn, and their labels."""
    book = run.setting.book
    first = [book.groups.index(str(digit)) for digit in range(10)]
    latents = generate(
        run.setting,
        grid_for(run, num_steps),
        speaker=student_speaker(run.setting.route, Role.AVERAGE),
        guidance_scale=1.0,
        prompts=[first[i % 10] for i in range(count)],
        seeds=range(FIRST_SEED, FIRST_SEED + count),
    )
    images = torch.cat([run.backbone.decode(part) for part in latents.split(8)])  # 8: in cache
    return images.numpy(), np.arange(count) % 10


def grid_for(run: Run, num_steps: int) -> StudentPath:
    """The grid the student was made for, or the even one where it was made for others."""
    for path in run.frame.paths:
        if path.num_steps == num_steps:
            return path
    return path_of(run.config, run.backbone, num_steps)


def results(root: Path) -> list[dict[str, Any]]:
    """Every result under a folder."""
    files = sorted(root.glob("*/*/seed-*/result.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]
